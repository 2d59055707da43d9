"""Where FlashInfer is used, and the reason that a log line gives where it is not."""

from pathlib import Path

import pytest
import torch

from dataplane import flashinfer_library
from dataplane.attention.choice import attention_backend
from dataplane.attention.interface import AttentionShape
from dataplane.attention.torch_attention import TorchAttention
from dataplane.flashinfer_library import why_no_flashinfer
from dataplane.model.config import parse_model_config
from dataplane.model.layer_ops import TorchLayerOps
from dataplane.model.layer_ops_choice import layer_ops, why_torch_layer_ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One where FlashInfer works."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flashinfer_library, "find_spec", lambda name: None if name == "flashinfer_jit_cache" else object())
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


def test_without_cuda_everything_is_torch() -> None:
    shape = AttentionShape(num_heads=8, num_kv_heads=2, head_dim=128, page_tokens=16, windows=frozenset({None}))
    config = parse_model_config(LLAMA, {}, Path("config.json"))
    assert why_no_flashinfer(128, torch.bfloat16, CPU) == "the device is cpu"
    assert why_torch_layer_ops(config, torch.bfloat16, CPU) == "the device is cpu"
    assert isinstance(attention_backend(shape, torch.bfloat16, CPU), TorchAttention)
    assert isinstance(layer_ops(config, torch.bfloat16, CPU), TorchLayerOps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_flashinfer_takes_half_precision_and_its_head_sizes(
    head_dim: int, dtype: torch.dtype, machine: pytest.MonkeyPatch
) -> None:
    assert why_no_flashinfer(head_dim, dtype, CUDA) is None


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (128, torch.float32, "the model is torch.float32, FlashInfer takes torch.bfloat16 and torch.float16"),
        (96, torch.bfloat16, "heads have 96 elements, FlashInfer takes 64, 128, 256"),
        (16, torch.float16, "heads have 16 elements, FlashInfer takes 64, 128, 256"),
    ],
)
def test_a_model_out_of_its_reach_runs_on_torch(
    head_dim: int, dtype: torch.dtype, reason: str, machine: pytest.MonkeyPatch
) -> None:
    shape = AttentionShape(num_heads=8, num_kv_heads=2, head_dim=head_dim, page_tokens=16, windows=frozenset({None}))
    assert why_no_flashinfer(head_dim, dtype, CUDA) == reason
    assert isinstance(attention_backend(shape, dtype, CUDA), TorchAttention)


def test_rows_that_are_no_whole_vectors_are_for_torch(machine: pytest.MonkeyPatch) -> None:
    config = parse_model_config(LLAMA | {"intermediate_size": 500}, {}, Path("config.json"))
    reason = why_torch_layer_ops(config, torch.bfloat16, CUDA)
    assert reason == "intermediate_size is 500, which is no multiple of 8"
    assert why_torch_layer_ops(parse_model_config(LLAMA, {}, Path("config.json")), torch.bfloat16, CUDA) is None


def test_an_old_device_runs_on_torch(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_no_flashinfer(128, torch.float16, CUDA) == "compute capability 7.5 is below 8.0"


def test_the_reason_says_what_to_install(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setattr("shutil.which", lambda name: None)
    machine.setattr(flashinfer_library, "_DEFAULT_NVCC", tmp_path / "nvcc")
    reason = why_no_flashinfer(128, torch.float16, CUDA)
    assert reason is not None and "nvcc" in reason
    # Kernels that were compiled elsewhere need no compiler.
    machine.setattr(flashinfer_library, "find_spec", lambda name: object())
    assert why_no_flashinfer(128, torch.float16, CUDA) is None
    machine.setattr(flashinfer_library, "find_spec", lambda name: None)
    reason = why_no_flashinfer(128, torch.float16, CUDA)
    assert reason == "FlashInfer is not installed: pip install 'loraplane[cuda]'"
