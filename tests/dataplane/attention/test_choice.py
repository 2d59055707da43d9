"""Which attention backend a model gets, and the reason that a log line gives when it is torch."""

from pathlib import Path

import pytest
import torch

from dataplane.attention import choice
from dataplane.attention.interface import AttentionShape
from dataplane.attention.torch_attention import TorchAttention

CUDA = torch.device("cuda")


def shape(head_dim: int = 128) -> AttentionShape:
    return AttentionShape(num_heads=8, num_kv_heads=2, head_dim=head_dim, page_tokens=16, windows=frozenset({None}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One where FlashInfer works."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "flashinfer_jit_cache" else object())
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


def test_without_cuda_the_backend_is_torch() -> None:
    cpu = torch.device("cpu")
    assert choice.why_torch_attention(shape(), torch.bfloat16, cpu) == "the device is cpu"
    assert isinstance(choice.attention_backend(shape(), torch.bfloat16, cpu), TorchAttention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_flashinfer_takes_half_precision_and_its_head_sizes(
    head_dim: int, dtype: torch.dtype, machine: pytest.MonkeyPatch
) -> None:
    assert choice.why_torch_attention(shape(head_dim), dtype, CUDA) is None


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (128, torch.float32, "the pool is torch.float32, FlashInfer takes torch.bfloat16 and torch.float16"),
        (96, torch.bfloat16, "heads have 96 elements, FlashInfer takes 64, 128, 256"),
        (16, torch.float16, "heads have 16 elements, FlashInfer takes 64, 128, 256"),
    ],
)
def test_a_model_out_of_its_reach_attends_with_torch(
    head_dim: int, dtype: torch.dtype, reason: str, machine: pytest.MonkeyPatch
) -> None:
    assert choice.why_torch_attention(shape(head_dim), dtype, CUDA) == reason
    assert isinstance(choice.attention_backend(shape(head_dim), dtype, CUDA), TorchAttention)


def test_an_old_device_attends_with_torch(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice.why_torch_attention(shape(), torch.float16, CUDA) == "compute capability 7.5 is below 8.0"


def test_the_reason_says_what_to_install(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setattr("shutil.which", lambda name: None)
    machine.setattr(choice, "_DEFAULT_NVCC", tmp_path / "nvcc")
    reason = choice.why_torch_attention(shape(), torch.float16, CUDA)
    assert reason is not None and "nvcc" in reason
    # Kernels that were compiled elsewhere need no compiler.
    machine.setattr(choice, "find_spec", lambda name: object())
    assert choice.why_torch_attention(shape(), torch.float16, CUDA) is None
    machine.setattr(choice, "find_spec", lambda name: None)
    reason = choice.why_torch_attention(shape(), torch.float16, CUDA)
    assert reason == "FlashInfer is not installed: pip install 'loraplane[cuda]'"
