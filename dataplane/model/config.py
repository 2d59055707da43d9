"""The configuration of a base model, read from its Hugging Face directory: every field honoured or refused by name.

Knows nothing about weights, devices or pages beyond the geometry that follows from the shapes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from adapter_store.geometry import DTYPE_BYTES, BaseGeometry, LinearShape
from dataplane.model.architectures import (
    ARCHITECTURES,
    IRRELEVANT_FIELDS,
    NEUTRAL_VALUES,
    READ_FIELDS,
    Architecture,
    SlidingWindow,
    is_neutral,
)
from dataplane.model.errors import ModelConfigError
from dataplane.model.fields import FieldReader, Json
from dataplane.model.rope import RopeConfig, read_rope

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

LAYER_TYPES = ("full_attention", "sliding_attention")

# What transformers takes for a Mistral file that does not mention the field.
MISTRAL_DEFAULT_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of one of the supported architectures.

    layer_windows: [num_layers], tokens that a layer attends to, itself included; None = all.
    dtype: of the checkpoint, as torch names it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def q_dim(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Elements of all key heads of one token."""
        return self.num_kv_heads * self.head_dim

    @property
    def linear_shapes(self) -> tuple[LinearShape, ...]:
        """The linear modules of a layer, in the order of LORA_MODULES."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (
            LinearShape("q_proj", hidden, self.q_dim),
            LinearShape("k_proj", hidden, self.kv_dim),
            LinearShape("v_proj", hidden, self.kv_dim),
            LinearShape("o_proj", self.q_dim, hidden),
            LinearShape("gate_proj", hidden, inner),
            LinearShape("up_proj", hidden, inner),
            LinearShape("down_proj", inner, hidden),
        )

    def geometry(self, dtype: str, max_lora_rank: int, model_name: str, fingerprint: str) -> BaseGeometry:
        """The geometry of this model when it is served in `dtype`."""
        return BaseGeometry(
            model_name=model_name,
            fingerprint=fingerprint,
            dtype=dtype,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            modules=self.linear_shapes,
            max_lora_rank=max_lora_rank,
        )


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads config.json and, for the end-of-sequence tokens, generation_config.json.

    Raises:
        ModelConfigError: a file is missing or malformed, or asks for something that is not computed; names all of it.
    """
    generation_path = model_dir / GENERATION_CONFIG_FILE
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return parse_model_config(_read_json(model_dir / CONFIG_FILE), generation, model_dir / CONFIG_FILE)


def parse_model_config(fields: Json, generation: Json, path: Path) -> ModelConfig:
    """The configuration in these two JSON objects; `path` is named in errors."""
    reader = FieldReader(fields)
    name, architecture = _architecture(reader)
    if architecture is None:
        raise ModelConfigError(path, reader.violations)
    _refuse_unread_fields(reader, architecture)
    num_layers = reader.required_int("num_hidden_layers")
    num_heads = reader.required_int("num_attention_heads")
    hidden_size = reader.required_int("hidden_size")
    max_position_embeddings = reader.required_int("max_position_embeddings")
    attention_bias = "attention_bias" in architecture.optional_fields and reader.boolean("attention_bias", False)
    config = ModelConfig(
        architecture=name,
        vocab_size=reader.required_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.required_int("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(reader, architecture, num_heads),
        head_dim=_head_dim(reader, architecture, hidden_size, num_heads),
        rms_norm_eps=reader.positive_float("rms_norm_eps", 1e-6),
        max_position_embeddings=max_position_embeddings,
        rope=read_rope(reader, max_position_embeddings),
        layer_windows=_layer_windows(reader, architecture, num_layers),
        qkv_bias=architecture.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias="mlp_bias" in architecture.optional_fields and reader.boolean("mlp_bias", False),
        qk_norm=architecture.qk_norm,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        dtype=_dtype(reader),
        eos_token_ids=_eos_token_ids(reader, FieldReader(generation, "generation_config.", reader.violations), architecture),
    )
    if reader.violations:
        raise ModelConfigError(path, reader.violations)
    return config


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelConfigError(path, ["the file is missing; a Hugging Face model directory is expected"]) from None
    except (OSError, ValueError) as error:
        raise ModelConfigError(path, [f"not readable as JSON: {error}"]) from error
    if not isinstance(value, dict):
        raise ModelConfigError(path, [f"must hold a JSON object, found {type(value).__name__}"])
    return value


def _architecture(reader: FieldReader) -> tuple[str, Architecture | None]:
    named = reader.fields.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        reader.refuse("architectures", f"must name one of {known}")
        return "", None
    architecture = ARCHITECTURES[named[0]]
    if reader.fields.get("model_type") not in (None, architecture.model_type):
        reader.refuse("model_type", f"{named[0]} has model_type {architecture.model_type!r}")
    return named[0], architecture


def _refuse_unread_fields(reader: FieldReader, architecture: Architecture) -> None:
    """Refuses what would be computed otherwise by whoever wrote the file."""
    for name, value in reader.fields.items():
        if name in READ_FIELDS or name in architecture.optional_fields or name in IRRELEVANT_FIELDS:
            continue
        if name not in NEUTRAL_VALUES:
            reader.refuse(name, "unknown field; remove it if it has no effect on inference")
        elif not is_neutral(name, value):
            reader.refuse(name, f"not supported for {architecture.model_type} models")
    if reader.fields.get("hidden_act") not in (None, "silu", "swish"):
        reader.refuse("hidden_act", "only 'silu' is supported")


def _num_kv_heads(reader: FieldReader, architecture: Architecture, num_heads: int) -> int:
    default = num_heads
    if "num_key_value_heads" not in reader.fields and architecture.default_num_kv_heads is not None:
        default = architecture.default_num_kv_heads
    num_kv_heads = reader.positive_int("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        reader.refuse("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads = {num_heads}")
    return num_kv_heads


def _head_dim(reader: FieldReader, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    default = architecture.default_head_dim or max(1, hidden_size // num_heads)
    head_dim = reader.positive_int("head_dim", default)
    if not reader.has("head_dim") and architecture.default_head_dim is None and hidden_size % num_heads:
        reader.refuse("head_dim", f"hidden_size = {hidden_size} is no multiple of num_attention_heads = {num_heads}")
    if head_dim % 2:
        reader.refuse("head_dim", f"rotary embedding needs an even head_dim, found {head_dim}")
    return head_dim


def _layer_windows(reader: FieldReader, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from the fields that the architecture has for it; `layer_types` must agree with them."""
    match architecture.sliding_window:
        case SlidingWindow.NEVER:
            windows: tuple[int | None, ...] = (None,) * num_layers
        case SlidingWindow.EVERY_LAYER:
            absent = "sliding_window" not in reader.fields
            given = reader.has("sliding_window")
            window = reader.positive_int("sliding_window", MISTRAL_DEFAULT_WINDOW) if absent or given else None
            windows = (window,) * num_layers
        case SlidingWindow.BY_LAYER:
            return _windows_by_layer(reader, num_layers)
    types = reader.fields.get("layer_types")
    if types is not None and types != [_layer_type(window) for window in windows]:
        reader.refuse("layer_types", f"a {architecture.model_type} model has {_layer_type(windows[0])} in every layer")
    return windows


def _windows_by_layer(reader: FieldReader, num_layers: int) -> tuple[int | None, ...]:
    """Qwen: `layer_types` says which layers have a window, or else all from `max_window_layers` on, if windows are used."""
    window: int | None = None
    if reader.boolean("use_sliding_window", False) and ("sliding_window" not in reader.fields or reader.has("sliding_window")):
        window = reader.positive_int("sliding_window", 4096)
    types = reader.fields.get("layer_types")
    if types is None:
        first = reader.non_negative_int("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers or any(t not in LAYER_TYPES for t in types):
        reader.refuse("layer_types", f"must be a list of {num_layers}, each one of {', '.join(LAYER_TYPES)}")
        return (None,) * num_layers
    if window is None and "sliding_attention" in types:
        reader.refuse("layer_types", "sliding_attention needs use_sliding_window and a sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layer_type(window: int | None) -> str:
    return LAYER_TYPES[0] if window is None else LAYER_TYPES[1]


def _dtype(reader: FieldReader) -> str:
    name = "dtype" if reader.has("dtype") else "torch_dtype"
    value = reader.fields.get(name)
    dtype = str(value).removeprefix("torch.") if value is not None else "float32"
    if dtype not in DTYPE_BYTES:
        reader.refuse(name, f"must be one of {', '.join(DTYPE_BYTES)}")
    return dtype


def _eos_token_ids(config: FieldReader, generation: FieldReader, architecture: Architecture) -> tuple[int, ...]:
    """Ids that end a text: of generation_config.json, else of config.json, else what transformers assumes."""
    reader = generation if generation.has("eos_token_id") else config
    value = reader.fields.get("eos_token_id")
    if value is None:
        default = architecture.default_eos_token_id
        return () if default is None or "eos_token_id" in config.fields else (default,)
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        reader.refuse("eos_token_id", "must be a token id or a list of them")
        return ()
    return tuple(ids)
