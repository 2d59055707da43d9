"""A thousand adapters of one base, registered and served in one run by a pool that holds ten of them at most."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from tests.e2e.conftest import Service, TinyModel

NUM_ADAPTERS = 1000
MAX_TOKENS = 6
RANK = 2
NUM_PAGES = 32

_BLOCK_OF = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in
             ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}  # fmt: skip


def _weights(seed: int, base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of every linear module of every layer, by PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(base.config.num_hidden_layers):
        for module, block in _BLOCK_OF.items():
            name = f"model.layers.{layer}.{block}.{module}"
            linear = base.get_submodule(name)
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, linear.in_features, generator=generator) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(linear.out_features, RANK, generator=generator) * 0.3
    return tensors


def _save(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(_BLOCK_OF), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@torch.inference_mode()
def _greedy_merged(base: PreTrainedModel, tensors: dict[str, torch.Tensor], prompt: tuple[int, ...]) -> list[int]:
    """What the base with these weights merged in answers."""
    merged = []
    for name, lora_a in tensors.items():
        if "lora_A" in name:
            linear = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            delta = 2.0 * tensors[name.replace("lora_A", "lora_B")] @ lora_a
            merged.append((linear.weight, linear.weight.clone()))
            linear.weight += delta
    tokens = list(prompt)
    for _ in range(MAX_TOKENS):
        tokens.append(int(base(torch.tensor([tokens])).logits[0, -1].argmax()))
    for weight, original in merged:
        weight.copy_(original)
    return tokens[len(prompt) :]


def test_a_thousand_adapters_answer_right_through_a_pool_of_ten(
    tmp_path: Path, build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", ())
    base = AutoModelForCausalLM.from_pretrained(model.base, dtype=torch.float32).eval().requires_grad_(False)
    rng = random.Random(3)
    names = [f"adapter-{number:04d}" for number in range(NUM_ADAPTERS)]
    prompts = {name: tuple(rng.randrange(3, 199) for _ in range(rng.randrange(1, 20))) for name in names}
    expected = {}
    for seed, name in enumerate(names):
        tensors = _weights(seed, base)
        _save(tmp_path / name, tensors)
        expected[name] = _greedy_merged(base, tensors, prompts[name])
    assert len({tuple(tokens) for tokens in expected.values()}) > NUM_ADAPTERS // 2, "the adapters hardly differ"

    async def scenario(service: "Service") -> None:
        for name in names:
            adapter = await service.register(name, tmp_path / name)
            assert adapter.current.num_pages * 11 > NUM_PAGES, "the pool holds more than ten adapters"
        requests = [((name, prompts[name]), {"max_tokens": MAX_TOKENS, "ignore_eos": True}) for name in names]
        rng.shuffle(requests)
        answers = await service.generate_each(requests)
        wrong = [name for ((name, _), _), answer in zip(requests, answers, strict=True) if answer.token_ids != expected[name]]
        assert not wrong, f"{len(wrong)} of {NUM_ADAPTERS} answered wrong, such as {wrong[:3]}"

    run_service(
        model,
        scenario,
        control_plane={"adapter_roots": (tmp_path,)},
        num_pages=NUM_PAGES,
        max_num_seqs=8,
        host_cache_bytes=1 << 22,
    )
