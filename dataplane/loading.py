"""Loads a base model onto its device, with its pool and all that a step needs. Knows no request."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapter_store.geometry import BaseGeometry
from dataplane.attention.choice import attention_backend
from dataplane.attention.interface import AttentionBackend, AttentionShape
from dataplane.config import DataPlaneConfig, LoadFormat
from dataplane.engine.admission import EngineLimits
from dataplane.errors import DataPlaneError
from dataplane.flashinfer_library import why_no_flashinfer
from dataplane.memory.pool_sizing import choose_num_pages, fit_max_model_len, warn_of_large_adapters
from dataplane.model.checkpoint import fingerprint
from dataplane.model.config import ModelConfig, load_model_config
from dataplane.model.decoder import Decoder, lora_groups
from dataplane.model.layer_ops import LayerOps
from dataplane.model.layer_ops_choice import layer_ops, why_torch_layer_ops
from dataplane.model.weights import ModelWeights, Progress, load_weights, make_dummy_weights
from dataplane.parts import Parts
from dataplane.runner.graphed_model import GraphedModel
from dataplane.runner.largest_step import StepLimits, measure_step_bytes
from dataplane.runner.model_runner import TorchModelRunner
from dataplane.runner.sampling import Sampler
from dataplane.runner.step_buffers import StepBuffers
from kernels.backend import why_torch
from kernels.lora import LoraAdapter, LoraOps
from kernels.plan_layout import LoraLimits

_log = logging.getLogger(__name__)

# Between numbers of rows for which a kernel of cuBLAS is loaded at start; in between it is taken to choose the same.
_ROWS_APART = 64


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device that computes steps. pool: [num_layers, num_pages + 1, page_elems], the last page for padding."""

    config: ModelConfig
    geometry: BaseGeometry
    limits: EngineLimits
    device: torch.device
    pool: torch.Tensor
    model: GraphedModel
    buffers: StepBuffers
    sampler: Sampler
    runs_ahead: bool

    def runner(self, adapter_of: Callable[[str], LoraAdapter]) -> TorchModelRunner:
        """What computes steps. adapter_of: where the rows of an adapter that is on the device lie, by digest."""
        page_tokens = self.limits.page_tokens
        return TorchModelRunner(self.model, self.pool, self.buffers, self.sampler, page_tokens, adapter_of, self.runs_ahead)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What is known of a model before its weights are loaded, and where it will run."""

    config: ModelConfig
    geometry: BaseGeometry
    device: torch.device


def read_base_model(config: DataPlaneConfig) -> BaseModel:
    """Reads what a model directory says of its model.

    Raises:
        DataPlaneError, ModelError: it cannot be served; the message says why.
    """
    device = _device(config)
    model = load_model_config(config.model_dir)
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    return BaseModel(model, model.geometry(dtype, config.max_lora_rank, config.model_name, fingerprint(config.model_dir)), device)


def load_model(
    config: DataPlaneConfig,
    base: BaseModel,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> LoadedModel:
    """Loads weights, sizes the pool and warms up; takes as long as reading the weights does.

    Raises:
        DataPlaneError, ModelError, PoolTooSmallError: it cannot be served; the message says why.
    """
    model_config, geometry, device = base.config, base.geometry, base.device
    _check_token_budget(config)
    max_model_len = _max_model_len(config, model_config)
    dtype = getattr(torch, geometry.dtype)
    clock = _Clock()
    weights = _weights(config, model_config, dtype, device, progress)
    clock.lap("weights")
    lora = _lora_ops(config, model_config, dtype, device, parts or Parts())
    attention = _attention(model_config, geometry.page_tokens, dtype, device)
    decoder = Decoder(model_config, weights, lora, attention, _layer_ops(model_config, dtype, device))
    model = GraphedModel(decoder, config.max_num_seqs, config.token_budget)
    uses_graphs = config.cuda_graphs and model.can_be_captured
    if device.type == "cuda":
        decoder.load_kernels(range(_ROWS_APART, config.token_budget + 1, _ROWS_APART), range(1, config.max_num_seqs + 1))
    clock.lap("kernels")
    sampler = Sampler(model_config.vocab_size, model_config.eos_token_ids, config.max_num_seqs, device)
    captured_rows = model.captured_rows if uses_graphs else ()
    step_limits = StepLimits(config.token_budget, config.max_num_seqs, max_model_len, captured_rows)
    num_pages = choose_num_pages(
        config, geometry, max_model_len, device, lambda: measure_step_bytes(decoder, sampler, geometry, step_limits, device)
    )
    max_model_len = fit_max_model_len(config, geometry, max_model_len, num_pages)
    warn_of_large_adapters(geometry, num_pages)
    limits = _limits(config, model_config, geometry, max_model_len, num_pages)
    pool = _allocate_pool(geometry, num_pages, device)
    clock.lap("pool")
    buffers = StepBuffers(config.token_budget, geometry.page_tokens, num_pages, device)
    if uses_graphs:
        model.capture(buffers, pool)
        clock.lap("graphs")
    runs_ahead = config.overlap and device.type == "cuda"
    _log.info(
        "model loaded model=%s pages=%d page_tokens=%d dtype=%s %s",
        config.model_name,
        num_pages,
        geometry.page_tokens,
        geometry.dtype,
        clock,
    )
    return LoadedModel(model_config, geometry, limits, device, pool, model, buffers, sampler, runs_ahead)


class _Clock:
    """How long the parts of loading took, for the log."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self._laps: list[str] = []

    def lap(self, name: str) -> None:
        """A part is done."""
        now = time.monotonic()
        self._laps.append(f"{name}_s={now - self._started_at:.1f}")
        self._started_at = now

    def __str__(self) -> str:
        return " ".join(self._laps)


def _allocate_pool(geometry: BaseGeometry, num_pages: int, device: torch.device) -> torch.Tensor:
    """Zeroed: torch may read, and then ignore, what nobody has written; a NaN there would not be ignored."""
    shape = (geometry.num_layers, num_pages + 1, geometry.page_elems)
    try:
        return torch.zeros(shape, dtype=getattr(torch, geometry.dtype), device=device)
    except RuntimeError as error:  # what torch raises for memory that it cannot have, on any device
        raise DataPlaneError(
            f"a pool of {num_pages} pages takes {num_pages * geometry.page_bytes} bytes on {device}, which cannot be had; "
            "lower --num-pages or --pool-bytes"
        ) from error


def _lora_ops(config: DataPlaneConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, parts: Parts) -> LoraOps:
    groups = lora_groups(model)
    limits = LoraLimits(config.token_budget, config.max_num_seqs, config.max_lora_rank)
    _warn_of_torch("LoRA runs", why_torch(groups, dtype, device), device)
    return parts.lora_ops(groups, dtype, device, limits)


def _attention(model: ModelConfig, page_tokens: int, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    windows = frozenset(model.layer_windows)
    shape = AttentionShape(model.num_heads, model.num_kv_heads, model.head_dim, page_tokens, windows)
    _warn_of_torch("attention runs", why_no_flashinfer(model.head_dim, dtype, device), device)
    return attention_backend(shape, dtype, device)


def _layer_ops(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> LayerOps:
    _warn_of_torch("norms, rotary positions and SwiGLU run", why_torch_layer_ops(model, dtype, device), device)
    return layer_ops(model, dtype, device)


def _warn_of_torch(what: str, reason: str | None, device: torch.device) -> None:
    """On the CPU there is nothing else, so it is no news there."""
    if device.type == "cuda" and reason is not None:
        _log.warning("%s on plain torch, which is slow: %s", what, reason)


def _device(config: DataPlaneConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DataPlaneError("--device cuda, but torch finds no CUDA device; use --device cpu or check the driver")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _check_token_budget(config: DataPlaneConfig) -> None:
    if config.token_budget < config.max_num_seqs:
        raise DataPlaneError(
            f"--token-budget {config.token_budget} is below --max-num-seqs {config.max_num_seqs}: every step computes one token "
            "of each decoding request; raise the one or lower the other"
        )


def _max_model_len(config: DataPlaneConfig, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise DataPlaneError(f"--max-model-len {config.max_model_len} is over the model's max_position_embeddings {longest}")
    return config.max_model_len


def _weights(
    config: DataPlaneConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> ModelWeights:
    if config.load_format is LoadFormat.DUMMY:
        return make_dummy_weights(model, dtype, device)
    return load_weights(config.model_dir, model, dtype, device, progress)


def _limits(
    config: DataPlaneConfig, model: ModelConfig, geometry: BaseGeometry, max_model_len: int, num_pages: int
) -> EngineLimits:
    return EngineLimits(
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        token_budget=config.token_budget,
        num_pages=num_pages,
        page_tokens=geometry.page_tokens,
    )
