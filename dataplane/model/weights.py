"""The base model's weights on the device, as the decoder multiplies them: q, k, v fused into one matrix, gate and up too.

Loads them from safetensors tensor by tensor, or makes random ones. Knows nothing of adapters, pages or the forward pass.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dataplane.model.checkpoint import STORED_DTYPES, StoredTensor, read_checkpoint, stream_tensors
from dataplane.model.config import ModelConfig
from dataplane.model.errors import ModelWeightsError

Progress = Callable[[int, int], None]

# Buffers that old checkpoints carry along; they follow from the configuration.
DERIVED_TENSORS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

DUMMY_SEED = 0


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out_features, in_features]; what the architecture lacks is None.

    qkv: rows of q, then k, then v. gate_up: rows of gate, then up.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights; with tied embeddings `lm_head` is `embedding` itself."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes on the device."""
        tensors = [self.embedding, self.norm] + ([] if self.lm_head is self.embedding else [self.lm_head])
        for layer in self.layers:
            tensors += [t for t in (getattr(layer, name) for name in layer.__slots__) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


def load_weights(
    model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> ModelWeights:
    """Reads the safetensors of a model directory, casting every tensor to `dtype` on its way to the device.

    progress: called with (bytes done, bytes in all), first with 0 and after each tensor.

    Raises:
        ModelWeightsError: names every tensor that is missing, unexpected, misshaped or of a type that is no weight.
    """
    stored = {name: s for name, s in read_checkpoint(model_dir).items() if not DERIVED_TENSORS.fullmatch(name)}
    weights, places = _allocate(config, dtype, device)
    violations = _violations(stored, places, config)
    if violations:
        raise ModelWeightsError(model_dir, violations)
    done, total = 0, sum(s.size_bytes for s in stored.values())
    report = progress or (lambda done, total: None)
    report(done, total)
    for name, tensor in stream_tensors(stored):
        if name in places:
            places[name].copy_(tensor)
        done += stored[name].size_bytes
        report(done, total)
    if config.tie_word_embeddings and LM_HEAD in stored:
        _check_tied(model_dir, stored)
    return weights


def make_dummy_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Random weights of this shape, made on the device, the same at each call on one kind of device.

    Matrices keep the variance of what passes through them, so that activations stay finite in half precision.
    """
    weights, places = _allocate(config, dtype, device)
    generator = torch.Generator(device=device).manual_seed(DUMMY_SEED)
    for name, place in places.items():
        if place.ndim == 2:
            place.normal_(0.0, 0.02 if name == EMBEDDING else 1.0 / math.sqrt(place.shape[1]), generator=generator)
        elif name.endswith(".bias"):
            place.normal_(0.0, 0.02, generator=generator)
        else:
            place.fill_(1.0)
    return weights


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[ModelWeights, dict[str, torch.Tensor]]:
    """Empty weights, and by each name of the checkpoint the part of them that it fills."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    places: dict[str, torch.Tensor] = {}
    embedding = places[EMBEDDING] = empty(config.vocab_size, config.hidden_size)
    layers = []
    for i in range(config.num_layers):
        layer = _empty_layer(config, empty)
        layers.append(layer)
        places.update({f"model.layers.{i}.{name}": place for name, place in _layer_places(config, layer).items()})
    norm = places["model.norm.weight"] = empty(config.hidden_size)
    lm_head = embedding
    if not config.tie_word_embeddings:
        lm_head = places[LM_HEAD] = empty(config.vocab_size, config.hidden_size)
    return ModelWeights(embedding, tuple(layers), norm, lm_head), places


def _empty_layer(config: ModelConfig, empty: Callable[..., torch.Tensor]) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv_dim = config.q_dim + 2 * config.kv_dim
    return LayerWeights(
        input_norm=empty(hidden),
        qkv=empty(qkv_dim, hidden),
        qkv_bias=empty(qkv_dim) if config.qkv_bias else None,
        q_norm=empty(config.head_dim) if config.qk_norm else None,
        k_norm=empty(config.head_dim) if config.qk_norm else None,
        o=empty(hidden, config.q_dim),
        o_bias=empty(hidden) if config.o_bias else None,
        post_attention_norm=empty(hidden),
        gate_up=empty(2 * inner, hidden),
        gate_up_bias=empty(2 * inner) if config.mlp_bias else None,
        down=empty(hidden, inner),
        down_bias=empty(hidden) if config.mlp_bias else None,
    )


def _layer_places(config: ModelConfig, layer: LayerWeights) -> dict[str, torch.Tensor]:
    """Which part of a layer each tensor of the checkpoint fills, by its name within the layer."""
    qkv_sizes = [config.q_dim, config.kv_dim, config.kv_dim]
    gate_up_sizes = [config.intermediate_size] * 2
    places: dict[str, torch.Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_attention_norm,
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
    }
    for kind, qkv, o, gate_up, down in (
        ("weight", layer.qkv, layer.o, layer.gate_up, layer.down),
        ("bias", layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias),
    ):
        if qkv is not None:
            parts = zip(("q_proj", "k_proj", "v_proj"), qkv.split_with_sizes(qkv_sizes), strict=True)
            places.update({f"self_attn.{name}.{kind}": part for name, part in parts})
        if gate_up is not None:
            parts = zip(("gate_proj", "up_proj"), gate_up.split_with_sizes(gate_up_sizes), strict=True)
            places.update({f"mlp.{name}.{kind}": part for name, part in parts})
        places[f"self_attn.o_proj.{kind}"] = o
        places[f"mlp.down_proj.{kind}"] = down
    return {name: place for name, place in places.items() if place is not None}


def _violations(stored: Mapping[str, StoredTensor], places: Mapping[str, torch.Tensor], config: ModelConfig) -> list[str]:
    """What is wrong between the checkpoint and the configuration, one line per tensor."""
    violations = [f"{name} is missing" for name in places if name not in stored]
    for name, tensor in stored.items():
        tied_head = name == LM_HEAD and config.tie_word_embeddings
        if name not in places and not tied_head:
            violations.append(f"{name} is unexpected in a {config.architecture}")
            continue
        expected = tuple(places[EMBEDDING if tied_head else name].shape)
        if tensor.shape != expected:
            violations.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
        if tensor.dtype not in STORED_DTYPES:
            violations.append(f"{name} is stored as {tensor.dtype}, supported are {', '.join(sorted(STORED_DTYPES))}")
    return violations


def _check_tied(model_dir: Path, stored: Mapping[str, StoredTensor]) -> None:
    """A checkpoint may repeat a tied matrix, but not contradict itself."""
    tied = dict(stream_tensors({name: stored[name] for name in (EMBEDDING, LM_HEAD)}))
    if not torch.equal(tied[EMBEDDING], tied[LM_HEAD]):
        raise ModelWeightsError(model_dir, [f"tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}"])
