"""Loading weights: one file or shards, everything in its place, and everything that is wrong named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dataplane.model.checkpoint import fingerprint
from dataplane.model.config import load_model_config, parse_model_config
from dataplane.model.errors import ModelWeightsError
from dataplane.model.weights import ModelWeights, load_weights, make_dummy_weights

FIELDS: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CPU = torch.device("cpu")
GATE = "model.layers.1.mlp.gate_proj.weight"
EXTRA_NORM = "model.layers.2.input_layernorm.weight"
EXTRA_BIAS = "model.layers.0.self_attn.q_proj.bias"


def save_model(directory: Path, max_shard_size: str = "1GB", **fields: Any) -> None:
    """A random Llama as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS, **fields))
    model.save_pretrained(directory, max_shard_size=max_shard_size)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    """All weights on the CPU."""
    return load_weights(directory, load_model_config(directory), dtype, CPU)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edits the tensors of model.safetensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def all_tensors(weights: ModelWeights) -> list[torch.Tensor]:
    """Every tensor, in a fixed order."""
    layers = [getattr(layer, name) for layer in weights.layers for name in layer.__slots__]
    return [weights.embedding, weights.norm, weights.lm_head, *(t for t in layers if t is not None)]


def test_projections_are_fused_in_order(tmp_path: Path) -> None:
    save_model(tmp_path, attention_bias=True, mlp_bias=True)
    stored = load_file(tmp_path / "model.safetensors")
    layer = load(tmp_path).layers[1]
    for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
        names = [f"model.layers.1.self_attn.{part}_proj.{kind}" for part in "qkv"]
        assert qkv is not None and torch.equal(qkv, torch.cat([stored[name] for name in names]))
        names = [f"model.layers.1.mlp.{part}_proj.{kind}" for part in ("gate", "up")]
        assert gate_up is not None and torch.equal(gate_up, torch.cat([stored[name] for name in names]))


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    save_model(tmp_path / "one")
    save_model(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(one), all_tensors(many), strict=True))


def test_progress_rises_from_nothing_to_every_byte(tmp_path: Path) -> None:
    save_model(tmp_path)
    calls: list[tuple[int, int]] = []
    load_weights(tmp_path, load_model_config(tmp_path), torch.float32, CPU, lambda done, total: calls.append((done, total)))
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1] == calls[0][1] > 0
    assert calls == sorted(calls)


def test_weights_are_cast_to_the_serving_dtype(tmp_path: Path) -> None:
    save_model(tmp_path)
    full, half = load(tmp_path), load(tmp_path, torch.bfloat16)
    assert half.layers[0].down.dtype == torch.bfloat16
    assert torch.equal(half.layers[0].down, full.layers[0].down.bfloat16())
    assert half.size_bytes * 2 == full.size_bytes == sum(t.numel() * 4 for t in all_tensors(full))


def test_a_tied_head_is_the_embedding_and_may_not_contradict_it(tmp_path: Path) -> None:
    save_model(tmp_path, tie_word_embeddings=True)
    weights = load(tmp_path)
    assert weights.lm_head is weights.embedding
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ModelWeightsError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path)


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    save_model(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"{GATE} is missing"),
        (lambda t: t.update({GATE: t[GATE].T.contiguous()}), f"{GATE} has shape [32, 48], expected [48, 32]"),
        (lambda t: t.update({EXTRA_NORM: torch.ones(32)}), f"{EXTRA_NORM} is unexpected"),
        (lambda t: t.update({EXTRA_BIAS: torch.ones(32)}), f"{EXTRA_BIAS} is unexpected in a LlamaForCausalLM"),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), f"{GATE} is stored as F8_E4M3, supported are BF16,"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), f"{GATE} is stored as I8"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    save_model(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelWeightsError) as caught:
        load(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelWeightsError, match=r"model.safetensors: not a whole safetensors file: .*the file (has|ends at)"):
        load(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"\xff\xff"])
def test_a_malformed_header_is_named(header: bytes, tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelWeightsError, match=r"not a whole safetensors file: (header: |tensor a: its header entry)"):
        load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelWeightsError, match=r"neither model.safetensors nor .* exists; found only pytorch_model.bin"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "not an index with a weight_map"),
        (lambda index: index["weight_map"].update(x="../x.safetensors"), "'../x.safetensors' is not a file of this directory"),
        (lambda index: index["weight_map"].update(x="lost.safetensors"), "lost.safetensors: not readable: No such file"),
        (lambda index: index["weight_map"].pop(GATE), f"{GATE} of model-0"),
        (lambda index: index["weight_map"].update(ghost=index["weight_map"][GATE]), "ghost is not in model-0"),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_refused(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    save_model(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ModelWeightsError) as caught:
        load(tmp_path)
    assert message in str(caught.value)


def test_the_fingerprint_tells_weights_and_configurations_apart(tmp_path: Path) -> None:
    save_model(tmp_path)
    seen = [fingerprint(tmp_path)]
    assert fingerprint(tmp_path) == seen[0]
    rewrite(tmp_path, lambda tensors: tensors[GATE].mul_(2))
    seen.append(fingerprint(tmp_path))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    seen.append(fingerprint(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    seen.append(fingerprint(tmp_path))
    assert len(set(seen)) == 4


def test_dummy_weights_repeat_and_keep_activations_in_range() -> None:
    fields = {"architectures": ["Qwen3ForCausalLM"], **FIELDS}
    config = parse_model_config(fields, {}, Path("config.json"))
    first, second = (make_dummy_weights(config, torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(first), all_tensors(second), strict=True))
    x = torch.randn(8, 32)
    assert 0.5 < (x @ first.layers[0].gate_up.T).std() < 2.0
    assert torch.equal(first.norm, torch.ones(32))
