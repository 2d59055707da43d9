"""Reading config.json: every field honoured, without effect, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from adapter_store.geometry import LORA_MODULES
from dataplane.model.architectures import ARCHITECTURES, IRRELEVANT_FIELDS, NEUTRAL_VALUES, READ_FIELDS
from dataplane.model.config import ModelConfig, load_model_config, parse_model_config
from dataplane.model.errors import ModelConfigError

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def parse(architecture: str = "Llama", generation: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    """A small configuration with these fields on top; `...` removes one."""
    merged = {"architectures": [f"{architecture}ForCausalLM"], **SHAPE, **fields}
    merged = {name: value for name, value in merged.items() if value is not ...}
    return parse_model_config(merged, generation or {}, Path("config.json"))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_field_that_transformers_writes_is_understood(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    config.architectures = [f"{family}ForCausalLM"]
    for use_diff in (True, False):
        ours = parse_model_config(json.loads(config.to_json_string(use_diff=use_diff)), {}, Path("config.json"))
        assert ours.head_dim == getattr(config, "head_dim", 16)
        assert ours.rms_norm_eps == config.rms_norm_eps
        assert ours.rope.theta == config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_fields_left_out_mean_what_transformers_takes_them_for(family: str) -> None:
    required = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"} | {"num_attention_heads": 32}
    theirs = getattr(transformers, f"{family}Config")(**required)
    ours = parse(family, num_key_value_heads=..., num_attention_heads=32)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 2)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.layer_windows == (getattr(theirs, "sliding_window", None),) * 2
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("Gemma", {}, "architectures = ['GemmaForCausalLM']: must name one of LlamaForCausalLM"),
        ("Llama", {"architectures": None}, "architectures = None: must name one of"),
        ("Llama", {"model_type": "qwen2"}, "model_type = 'qwen2': LlamaForCausalLM has model_type 'llama'"),
        ("Llama", {"logit_scale": 2.0}, "logit_scale = 2.0: unknown field"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: not supported for llama models"),
        ("Llama", {"auto_map": {"AutoModel": "x.py"}}, "auto_map = {'AutoModel': 'x.py'}: not supported"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu' is supported"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: not supported"),
        ("Llama", {"sliding_window": 128}, "sliding_window = 128: not supported for llama models"),
        ("Llama", {"layer_types": ["sliding_attention"] * 2}, "a llama model has full_attention in every layer"),
        ("Mistral", {"attention_bias": True}, "attention_bias = True: not supported for mistral models"),
        ("Mistral", {"use_sliding_window": True}, "use_sliding_window = True: not supported for mistral models"),
        ("Qwen2", {"mlp_bias": True}, "mlp_bias = True: not supported for qwen2 models"),
        ("Qwen2", {"layer_types": ["full_attention"]}, "must be a list of 2, each one of full_attention, sliding_attention"),
        ("Qwen2", {"layer_types": [["x"], {}]}, "must be a list of 2, each one of"),
        ("Qwen3", {"layer_types": ["sliding_attention"] * 2}, "sliding_attention needs use_sliding_window"),
        ("Llama", {"hidden_size": ...}, "hidden_size is missing"),
        ("Llama", {"vocab_size": "100"}, "vocab_size = '100': must be an integer of at least 1"),
        ("Llama", {"num_hidden_layers": True}, "num_hidden_layers = True: must be an integer"),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3: 3 does not divide num_attention_heads = 4"),
        ("Llama", {"head_dim": 15}, "head_dim = 15: rotary embedding needs an even head_dim, found 15"),
        ("Llama", {"hidden_size": 66}, "hidden_size = 66 is no multiple of num_attention_heads = 4"),
        ("Llama", {"rms_norm_eps": 0}, "rms_norm_eps = 0: must be a finite number above 0"),
        ("Llama", {"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn': must be one of float32, bfloat16, float16"),
        ("Llama", {"eos_token_id": "</s>"}, "eos_token_id = '</s>': must be a token id or a list of them"),
        ("Llama", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type 'dynamic' is not supported"),
        ("Llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type 'longrope' is not supported"),
        ("Llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ("Llama", {"rope_scaling": [1]}, "rope_scaling = [1]: must be an object"),
        ("Llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "rope_scaling.beta = 1: unknown field"),
        ("Llama", {"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta = -1: must be a finite number above 0"),
        ("Llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25: only 1.0 is supported"),
        ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor is missing"),
    ],
)  # fmt: skip
def test_what_would_not_be_honoured_is_refused_by_name(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        parse(architecture, **fields)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_neutral_and_irrelevant_fields_change_nothing(architecture: str) -> None:
    fields: dict[str, Any] = {name: values[0] if values else None for name, values in NEUTRAL_VALUES.items()}
    fields |= dict.fromkeys(IRRELEVANT_FIELDS, 7)
    for name in ARCHITECTURES[f"{architecture}ForCausalLM"].optional_fields:
        del fields[name]  # read by this one
    assert parse(architecture, **fields) == parse(architecture)


def test_a_field_has_one_meaning_only() -> None:
    assert not READ_FIELDS & IRRELEVANT_FIELDS
    assert not READ_FIELDS & NEUTRAL_VALUES.keys()
    assert not IRRELEVANT_FIELDS & NEUTRAL_VALUES.keys()


def test_all_violations_are_named_at_once() -> None:
    with pytest.raises(ModelConfigError) as caught:
        parse(hidden_act="relu", vocab_size=0, mystery=1, rope_scaling={"type": "linear", "factor": "x"})
    assert len(caught.value.violations) == 4


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, {}, (5,)),
        ([5, 6], {}, (5, 6)),
        (5, {"eos_token_id": [7, 8]}, (7, 8)),
        (5, {"eos_token_id": 9}, (9,)),
        (5, {"eos_token_id": None}, (5,)),
        (None, {}, ()),
        (..., {}, (2,)),
    ],
)
def test_generation_config_decides_what_ends_a_text(config: Any, generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert parse(eos_token_id=config, generation=generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 8}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8, 8)),
        ({"use_sliding_window": True, "sliding_window": 8}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
    ],
)
def test_qwen_windows_are_by_layer(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse("Qwen2", **fields).layer_windows == windows
    theirs = transformers.Qwen2Config(**SHAPE, **fields)
    assert [("sliding_attention" if w else "full_attention") for w in windows] == theirs.layer_types


def test_geometry_lists_the_modules_in_packing_order() -> None:
    geometry = parse(head_dim=24).geometry("bfloat16", 64, "tiny", "abc")
    assert tuple(module.name for module in geometry.modules) == LORA_MODULES
    o_proj = geometry.module("o_proj")
    assert o_proj is not None and (o_proj.in_features, o_proj.out_features) == (96, 64)
    assert (geometry.num_layers, geometry.kv_dim, geometry.dtype, geometry.fingerprint) == (2, 48, "bfloat16", "abc")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "config.json: the file is missing"), ("{", "not readable as JSON"), ("[]", "must hold a JSON object, found list")],
)
def test_a_broken_file_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match=message):
        load_model_config(tmp_path)
