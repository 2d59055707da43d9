"""Builds a data plane from its configuration: model, pool, residency and engine, wired together. Serves nothing yet."""

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from adapter_store.geometry import BaseGeometry
from adapter_store.host_cache import HostCache
from adapter_store.image_store import ImageStore
from dataplane.attention.choice import attention_backend, why_torch_attention
from dataplane.attention.interface import AttentionBackend, AttentionShape
from dataplane.config import DataPlaneConfig, LoadFormat
from dataplane.engine.admission import EngineLimits
from dataplane.engine.engine import Engine
from dataplane.engine.inbox import Inbox
from dataplane.memory.adapter_copy import TensorCopier
from dataplane.memory.page_pool import PagePool
from dataplane.memory.pool_sizing import choose_num_pages, fit_max_model_len, warn_of_large_adapters
from dataplane.memory.residency import Residency
from dataplane.model.checkpoint import fingerprint
from dataplane.model.config import ModelConfig, load_model_config
from dataplane.model.decoder import Decoder, lora_groups
from dataplane.model.weights import ModelWeights, Progress, load_weights, make_dummy_weights
from dataplane.runner.model_runner import TorchModelRunner
from kernels.backend import lora_ops, why_torch
from kernels.lora import LoraOps
from kernels.plan_layout import LoraLimits
from protos.loraplane.v1 import data_plane_pb2 as pb

_log = logging.getLogger(__name__)

# Threads that read adapters from the store.
NUM_FETCH_WORKERS = 4


class DataPlaneError(Exception):
    """The configuration cannot be served as it stands; the message says what to change."""


@dataclass(frozen=True, slots=True)
class DataPlane:
    """A loaded model and its engine, whose thread has not been started."""

    inbox: Inbox
    engine: Engine
    host_cache: HostCache
    description: pb.DescribeResponse

    def start_engine(self, on_failure: Callable[[], None]) -> threading.Thread:
        """Starts the engine's thread. It is a daemon: a step that hangs must not keep a process alive that was told to end."""
        thread = threading.Thread(target=self.engine.run, args=(on_failure,), name="engine", daemon=True)
        thread.start()
        return thread


def load_data_plane(config: DataPlaneConfig, progress: Progress | None = None) -> DataPlane:
    """Loads the model and sizes the pool; takes as long as reading the weights does.

    Raises:
        DataPlaneError, ModelError, PoolTooSmallError: it cannot be served; the message says why.
    """
    device = _device(config)
    store = _open_store(config)
    model_config = load_model_config(config.model_dir)
    max_model_len = _max_model_len(config, model_config)
    dtype = model_config.dtype if config.dtype == "auto" else config.dtype
    geometry = model_config.geometry(dtype, config.max_lora_rank, config.model_name, fingerprint(config.model_dir))
    weights = _weights(config, model_config, getattr(torch, dtype), device, progress)
    lora = _lora_ops(config, model_config, getattr(torch, dtype), device)
    attention = _attention(model_config, geometry.page_tokens, getattr(torch, dtype), device)
    model = Decoder(model_config, weights, lora, attention)
    num_pages = choose_num_pages(config, geometry, max_model_len, model, device)
    max_model_len = fit_max_model_len(config, geometry, max_model_len, num_pages)
    warn_of_large_adapters(geometry, num_pages)
    limits = _limits(config, model_config, geometry, max_model_len, num_pages)
    pool = _allocate_pool(geometry, num_pages, device)
    epoch = secrets.randbits(63)
    _log.info("model loaded model=%s pages=%d page_tokens=%d dtype=%s", config.model_name, num_pages, geometry.page_tokens, dtype)
    inbox, host_cache, engine = _build_engine(config, store, geometry, limits, model, pool, epoch)
    return DataPlane(inbox, engine, host_cache, _describe(config, model_config, geometry, limits, device, epoch))


def _allocate_pool(geometry: BaseGeometry, num_pages: int, device: torch.device) -> torch.Tensor:
    """Zeroed: torch may read, and then ignore, what nobody has written; a NaN there would not be ignored."""
    shape = (geometry.num_layers, num_pages, geometry.page_elems)
    try:
        return torch.zeros(shape, dtype=getattr(torch, geometry.dtype), device=device)
    except RuntimeError as error:  # what torch raises for memory that it cannot have, on any device
        raise DataPlaneError(
            f"a pool of {num_pages} pages takes {num_pages * geometry.page_bytes} bytes on {device}, which cannot be had; "
            "lower --num-pages or --pool-bytes"
        ) from error


def _build_engine(
    config: DataPlaneConfig,
    store: ImageStore,
    geometry: BaseGeometry,
    limits: EngineLimits,
    model: Decoder,
    pool: torch.Tensor,
    epoch: int,
) -> tuple[Inbox, HostCache, Engine]:
    inbox = Inbox()
    host_cache = HostCache(
        store,
        geometry,
        config.host_cache_bytes,
        num_workers=NUM_FETCH_WORKERS,
        pin_memory=pool.is_cuda,
        on_evict=inbox.put_evicted,
    )
    pages = PagePool(limits.num_pages)
    residency = Residency(pages, host_cache, TensorCopier(pool), inbox.put_fetched)
    runner = TorchModelRunner(model, pool, limits.page_tokens, limits.eos_token_ids, residency.adapter)
    return inbox, host_cache, Engine(inbox, runner, pages, residency, limits, epoch, config.orphan_grace_s)


def _lora_ops(config: DataPlaneConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> LoraOps:
    groups = lora_groups(model)
    reason = why_torch(groups, dtype, device)
    if device.type == "cuda" and reason is not None:
        _log.warning("LoRA runs on plain torch, which is slow: %s", reason)
    return lora_ops(groups, dtype, device, LoraLimits(config.token_budget, config.max_num_seqs, config.max_lora_rank))


def _attention(model: ModelConfig, page_tokens: int, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    windows = frozenset(model.layer_windows)
    shape = AttentionShape(model.num_heads, model.num_kv_heads, model.head_dim, page_tokens, windows)
    reason = why_torch_attention(shape, dtype, device)
    if device.type == "cuda" and reason is not None:
        _log.warning("attention runs on plain torch, which is slow: %s", reason)
    return attention_backend(shape, dtype, device)


def _device(config: DataPlaneConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DataPlaneError("--device cuda, but torch finds no CUDA device; use --device cpu or check the driver")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _open_store(config: DataPlaneConfig) -> ImageStore:
    """Before the model is loaded, which may take minutes that a wrong path should not cost."""
    try:
        return ImageStore(config.store_dir)
    except OSError as error:
        raise DataPlaneError(f"--store-dir {config.store_dir} cannot be opened: {error.strerror}") from error


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
    try:
        return EngineLimits(
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            token_budget=config.token_budget,
            num_pages=num_pages,
            page_tokens=geometry.page_tokens,
        )
    except ValueError as error:
        raise DataPlaneError(str(error)) from error


def _describe(
    config: DataPlaneConfig, model: ModelConfig, geometry: BaseGeometry, limits: EngineLimits, device: torch.device, epoch: int
) -> pb.DescribeResponse:
    return pb.DescribeResponse(
        epoch=epoch,
        version=_version(),
        model=pb.ModelDescription(
            name=geometry.model_name,
            fingerprint=geometry.fingerprint,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
            modules=[
                pb.LinearModule(name=m.name, in_features=m.in_features, out_features=m.out_features) for m in geometry.modules
            ],
        ),
        pool=pb.PoolDescription(num_pages=limits.num_pages, page_tokens=geometry.page_tokens, page_elems=geometry.page_elems),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        max_num_seqs=limits.max_num_seqs,
        token_budget=limits.token_budget,
        max_model_len=limits.max_model_len,
        max_lora_rank=config.max_lora_rank,
        host_cache_bytes=config.host_cache_bytes,
    )


def _version() -> str:
    try:
        return version("loraplane")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
