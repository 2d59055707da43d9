"""The decoder against transformers and peft: every architecture, any chunking, scattered pages, adapters mixed in one step."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode

VOCAB = 97
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12, "rms_norm_eps": 1e-3}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-rope-yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2-rope-yarn": ("Qwen2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}}),
    "qwen3-rope-yarn": ("Qwen3", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied-biases": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-layer-types": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_model(variant: str, directory: Path, device: str = "cpu") -> Any:
    """A random model with every parameter away from its neutral value, saved as transformers saves it."""
    family, fields = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**(SMALL | fields))
    torch.manual_seed(len(variant))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return model.to(device)


def make_tokens(length: int, seed: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def run_mixed(paged: Any, requests: Sequence[Any]) -> None:
    """One request's whole prompt, others' odd chunks beside it, then decodes and chunks together until all is computed."""
    chunks = [len(requests[0].token_ids) - 8, *([7, 5, 1, 16, 3, 11, 2][i % 7] for i in range(len(requests) - 1))]
    paged.step([(requests[0], chunks[0])])
    while waiting := [(r, c) for r, c in zip(requests, chunks, strict=True) if r.num_computed < len(r.token_ids)]:
        steps = []
        for request, chunk in waiting:
            left = len(request.token_ids) - request.num_computed
            decode = request is requests[0] or left <= 4
            steps.append((request, 1 if decode else min(chunk, left)))
        paged.step(steps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_whatever_the_chunks(
    variant: str, device: str, tmp_path: Path, paged_model: Any, paged_request: Any, oracle: Callable[..., torch.Tensor]
) -> None:
    model = make_model(variant, tmp_path, device)
    paged = paged_model(tmp_path, torch.float32, device)
    requests = [paged_request(make_tokens(n, seed=n)) for n in (50, 37, 20, 5, 33)]
    run_mixed(paged, requests)
    for request in requests:
        expected = oracle(model, request.token_ids)
        torch.testing.assert_close(torch.cat(request.logits), expected, atol=1e-4, rtol=1e-4)


ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 12, "target_modules": MODULES},
    "one": {"r": 1, "lora_alpha": 2, "target_modules": ["v_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 7, "up_proj": 2},
        "alpha_pattern": {"q_proj": 20, "gate_proj": 1},
        "target_modules": ["q_proj", "up_proj", "gate_proj"],
    },
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["llama", "llama-biases", "mistral-window", "qwen2", "qwen3"])
def test_every_request_of_a_step_is_answered_by_its_own_adapter(
    variant: str, device: str, tmp_path: Path, paged_model: Any, paged_request: Any, oracle: Callable[..., torch.Tensor]
) -> None:
    base = make_model(variant, tmp_path, device)
    paged = paged_model(tmp_path, torch.float32, device)
    torch.manual_seed(0)
    peft_model: Any = None
    for added, fields in ADAPTERS.items():
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **fields)
        if peft_model is None:
            peft_model = get_peft_model(base, config, adapter_name=added)
        else:
            peft_model.add_adapter(added, config)
    peft_model.to(device).eval()
    adapters = {name: paged.add_adapter(peft_model, name) for name in ADAPTERS}
    plan: list[str | None] = ["all", None, "patterns", "one", "all", "rslora", None]
    requests = [paged_request(make_tokens(18 + 3 * i, seed=i), adapters[name] if name else None) for i, name in enumerate(plan)]
    run_mixed(paged, requests)
    answers = []
    for request, name in zip(requests, plan, strict=True):
        if name:
            peft_model.set_adapter(name)
            expected = oracle(peft_model, request.token_ids)
        else:
            with peft_model.disable_adapter():
                expected = oracle(peft_model, request.token_ids)
        torch.testing.assert_close(torch.cat(request.logits), expected, atol=2e-4, rtol=1e-4)
        with peft_model.disable_adapter():
            answers.append((expected - oracle(peft_model, request.token_ids)).abs().max().item())
    # the adapters do something, so that equality above says something
    assert all((answer > 0.1) == (name is not None) for answer, name in zip(answers, plan, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_stays_near_transformers(
    device: str, tmp_path: Path, paged_model: Any, paged_request: Any, oracle: Callable[..., torch.Tensor]
) -> None:
    model = make_model("qwen3", tmp_path, device)
    full = oracle(model, make_tokens(40, seed=1))
    half = oracle(model.to(torch.bfloat16), make_tokens(40, seed=1))
    request = paged_request(make_tokens(40, seed=1))
    paged = paged_model(tmp_path, torch.bfloat16, device)
    run_mixed(paged, [request])
    error = (torch.cat(request.logits) - full).abs().mean()
    assert error < 1.5 * (half - full).abs().mean()  # no worse than bf16 is in transformers itself


def test_only_the_wanted_rows_have_logits_and_none_may_be_wanted(tmp_path: Path, paged_model: Any, paged_request: Any) -> None:
    make_model("llama", tmp_path)
    paged = paged_model(tmp_path, torch.float32, "cpu")
    seen = []
    forward = paged._decoder.forward

    def pick_rows(inputs: Any, pool: torch.Tensor) -> torch.Tensor:
        every = forward(inputs, pool)
        for rows in ([], [2], [0, 2, 5]):
            picked = forward(replace(inputs, logits_rows=torch.tensor(rows, dtype=torch.int32)), pool)
            assert picked.shape == (len(rows), VOCAB) and picked.dtype == torch.float32
            torch.testing.assert_close(picked, every[rows], atol=1e-5, rtol=1e-5)
            seen.append(rows)
        return every

    paged._decoder.forward = pick_rows
    paged.step([(paged_request(make_tokens(6, seed=0)), 6)])
    assert len(seen) == 3


class _Products(TorchFunctionMode):
    """Records the shapes of all products: rows, columns of the result, whether with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int, bool]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes note and goes on."""
        if func is torch.nn.functional.linear:
            self.seen.add((len(args[0]), len(args[1]), args[2] is not None if len(args) > 2 else False))
        elif func in (torch.mm, torch.addmm):
            self.seen.add((len(args[-2]), args[-1].shape[1], func is torch.addmm))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["llama", "llama-biases", "qwen2"])
def test_kernels_are_loaded_for_just_the_products_of_steps_of_so_many_rows(
    variant: str, tmp_path: Path, paged_model: Any, paged_request: Any
) -> None:
    make_model(variant, tmp_path)
    paged = paged_model(tmp_path, torch.float32, "cpu")
    with _Products() as loaded:
        paged._decoder.load_kernels((7, 9), (7, 9))
    with _Products() as multiplied:
        for length in (7, 9):
            paged.step([(paged_request(make_tokens(length, seed=length)), length)])
    assert multiplied.seen == loaded.seen


def test_a_file_in_the_old_format_reads_the_same(
    tmp_path: Path, paged_model: Any, paged_request: Any, oracle: Callable[..., torch.Tensor]
) -> None:
    model = make_model("llama-rope-llama3", tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope
    fields["torch_dtype"] = fields.pop("dtype")
    path.write_text(json.dumps(fields))
    request = paged_request(make_tokens(40, seed=1))
    run_mixed(paged_model(tmp_path, torch.float32, "cpu"), [request])
    torch.testing.assert_close(torch.cat(request.logits), oracle(model, request.token_ids), atol=1e-4, rtol=1e-4)
