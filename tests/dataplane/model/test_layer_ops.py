"""Norms, rotary positions and SwiGLU with FlashInfer against torch in fp32; the table of angles against the angles."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dataplane.flashinfer_library import why_no_flashinfer
from dataplane.model.config import ModelConfig, parse_model_config
from dataplane.model.layer_ops import LayerOps, TorchLayerOps
from dataplane.model.layer_ops_choice import layer_ops
from dataplane.model.rope import cos_sin, cos_sin_table, inverse_frequencies

TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
FIELDS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 768,
    "intermediate_size": 1096,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 500,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}
NUM_ROWS = (1, 7, 200)


def make_config(rope: str = "default", **fields: Any) -> ModelConfig:
    parameters = {"rope_parameters": {"rope_theta": 1e4} | ROPES[rope]}
    return parse_model_config(FIELDS | parameters | fields, {}, Path("config.json"))


@pytest.mark.parametrize("rope", ROPES)
def test_the_table_holds_the_angles_of_every_position(rope: str) -> None:
    config = make_config(rope)
    cpu = torch.device("cpu")
    table = cos_sin_table(config.rope, config.head_dim, 500, cpu)
    frequencies = inverse_frequencies(config.rope, config.head_dim, cpu)
    positions = torch.arange(500, dtype=torch.int32)
    cos, sin = cos_sin(frequencies, config.rope.attention_factor, positions, torch.float32)
    half = config.head_dim // 2
    assert torch.equal(table[:, :half], cos[:, 0, :half]) and torch.equal(table[:, half:], sin[:, 0, :half])


def make(config: ModelConfig, dtype: torch.dtype) -> tuple[LayerOps, LayerOps]:
    """FlashInfer's operations and torch's."""
    device = torch.device("cuda")
    reason = why_no_flashinfer(config.head_dim, dtype, device)
    if reason is not None:
        pytest.skip(reason)
    ops = layer_ops(config, dtype, device)
    assert not isinstance(ops, TorchLayerOps)
    return ops, TorchLayerOps(config, device)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_norms_agree_with_fp32(dtype: torch.dtype) -> None:
    config = make_config()
    ops, torch_ops = make(config, dtype)
    weight = random(config.hidden_size, dtype=dtype)
    for num_rows in NUM_ROWS:
        x, hidden = random(num_rows, config.hidden_size, dtype=dtype), random(num_rows, config.hidden_size, dtype=dtype)
        assert_close(ops.norm(x, weight), torch_ops.norm(x.float(), weight.float()))
        wide = hidden.float()
        expected = torch_ops.add_norm(x.float(), wide, weight.float())
        assert_close(ops.add_norm(x, hidden, weight), expected)
        assert_close(hidden, wide)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_swiglu_agrees_with_fp32(dtype: torch.dtype) -> None:
    config = make_config()
    ops, torch_ops = make(config, dtype)
    for num_rows in NUM_ROWS:
        gate_up = random(num_rows, 2 * config.intermediate_size, dtype=dtype)
        assert_close(ops.swiglu(gate_up), torch_ops.swiglu(gate_up.float()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rope", ROPES)
def test_heads_are_normed_and_rotated_in_place_between_other_columns(rope: str, dtype: torch.dtype) -> None:
    """q and k are views of one wide matrix, of which v must stay as it is."""
    config = make_config(rope)
    ops, torch_ops = make(config, dtype)
    weight = random(config.head_dim, dtype=dtype)
    heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    for num_rows in NUM_ROWS:
        qkv = random(num_rows, sum(heads), config.head_dim, dtype=dtype)
        q, k, v = qkv.split_with_sizes(heads, dim=1)
        wide_q, wide_k, before = q.float(), k.float(), v.clone()
        positions = torch.randint(0, 500, (num_rows,), dtype=torch.int32, device="cuda")
        for each, inputs in ((ops, (q, k)), (torch_ops, (wide_q, wide_k))):
            each.norm_heads(inputs[0], weight.to(inputs[0].dtype))
            each.norm_heads(inputs[1], weight.to(inputs[1].dtype))
            each.rotate(*inputs, each.angles(positions, inputs[0].dtype))
        # Two roundings, one behind each operation.
        torch.testing.assert_close(q.float(), wide_q, atol=3 * TOLERANCE[dtype], rtol=3 * TOLERANCE[dtype])
        torch.testing.assert_close(k.float(), wide_k, atol=3 * TOLERANCE[dtype], rtol=3 * TOLERANCE[dtype])
        assert torch.equal(v, before)
