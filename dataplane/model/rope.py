"""Rotary position embedding: which variants are computed, their frequencies and their rotation. Knows nothing of the rest."""

import math
from dataclasses import dataclass

import torch

from dataplane.model.fields import FieldReader, Json

DEFAULT_THETA = 10000.0

# Fields that each variant reads, beside its type and rope_theta; any other is refused by name.
VARIANT_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        }
    ),
}
COMMON_FIELDS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One variant of rotary embedding; a field that the variant does not read keeps its default."""

    variant: str = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def read_rope(config: FieldReader, max_position_embeddings: int) -> RopeConfig:
    """The rotary embedding that config.json asks for, in the old (`rope_scaling`) or the new (`rope_parameters`) place."""
    place = "rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters"
    fields = config.object(place)
    reader = FieldReader(fields, f"{place}.", config.violations)
    theta = reader.positive_float("rope_theta", config.positive_float("rope_theta", DEFAULT_THETA))
    variant = fields.get("rope_type", fields.get("type", "default"))
    if not isinstance(variant, str) or variant not in VARIANT_FIELDS:
        nested = any(isinstance(value, dict) for value in fields.values())
        why = "a rotary embedding for each layer type" if nested else f"rope_type {variant!r}"
        config.violations.append(f"{place}: {why} is not supported; supported are {', '.join(VARIANT_FIELDS)}")
        return RopeConfig()
    for name in fields:
        if name not in COMMON_FIELDS | VARIANT_FIELDS[variant]:
            reader.refuse(name, f"unknown field of rope_type {variant!r}")
    if fields.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        reader.refuse("partial_rotary_factor", "only 1.0 is supported")
    # A length outside of the nested object wins, as it does in transformers.
    original = reader.positive_int("original_max_position_embeddings", max_position_embeddings)
    original = config.positive_int("original_max_position_embeddings", original)
    return RopeConfig(
        variant=variant,
        theta=theta,
        factor=1.0 if variant == "default" else reader.positive_float("factor", None),
        low_freq_factor=reader.positive_float("low_freq_factor", None if variant == "llama3" else 1.0),
        high_freq_factor=reader.positive_float("high_freq_factor", None if variant == "llama3" else 4.0),
        original_max_position_embeddings=original,
        attention_factor=_attention_factor(reader, fields) if variant == "yarn" else 1.0,
        beta_fast=reader.positive_float("beta_fast", 32.0),
        beta_slow=reader.positive_float("beta_slow", 1.0),
        truncate=reader.boolean("truncate", True),
    )


def _attention_factor(reader: FieldReader, fields: Json) -> float:
    """What YaRN multiplies cos and sin with: given, or from `mscale`s, or from the factor alone."""
    if reader.has("attention_factor"):
        return reader.positive_float("attention_factor", None)

    def mscale(weight: float) -> float:
        factor = reader.positive_float("factor", 1.0)
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return mscale(reader.positive_float("mscale", 1.0)) / mscale(reader.positive_float("mscale_all_dim", 1.0))
    return mscale(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] fp32."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = rope.theta**steps
    plain = 1.0 / periods
    match rope.variant:
        case "linear":
            plain = plain / rope.factor
        case "llama3":
            plain = _llama3_frequencies(rope, plain)
        case "yarn":
            plain = _yarn_frequencies(rope, periods, head_dim)
    return plain.to(device)


def _llama3_frequencies(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Slows long waves by the factor, keeps short ones, blends between (Llama 3.1)."""
    context_len = rope.original_max_position_embeddings
    wavelen = 2 * math.pi / plain
    blend = (context_len / wavelen - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    slowed = torch.where(wavelen > context_len / rope.low_freq_factor, plain / rope.factor, blended)
    return torch.where(wavelen < context_len / rope.high_freq_factor, plain, slowed)


def _yarn_frequencies(rope: RopeConfig, periods: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Interpolates the dimensions that turn seldom within the original context, keeps those that turn often (YaRN §3.2).

    In the order of transformers' operations, so that every bit is equal.
    """

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def cos_sin(
    frequencies: torch.Tensor, attention_factor: float, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every token's angles, each [num_tokens, 1, head_dim], computed in fp32."""
    angles = positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """Cosines, then sines of the angles at every position, [num_positions, head_dim] fp32."""
    angles = torch.arange(num_positions, device=device)[:, None].float() * inverse_frequencies(rope, head_dim, device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [num_tokens, num_heads, head_dim] turned to its positions; dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
