"""Which backend serves the LoRA operation where there is no GPU to ask."""

import pytest
import torch

from kernels import backend
from kernels.lora import LoraTarget
from kernels.lora_torch import TorchLoraOps
from kernels.plan_layout import LoraLimits

LIMITS = LoraLimits(max_tokens=64, max_requests=8, max_rank=16)


def groups(in_features: int = 64, out_features: int = 64) -> tuple[tuple[LoraTarget, ...], ...]:
    return ((LoraTarget("q_proj", in_features, out_features, 0),),)


def test_without_a_cuda_device_torch_serves() -> None:
    cpu = torch.device("cpu")
    assert isinstance(backend.lora_ops(groups(), torch.bfloat16, cpu, LIMITS), TorchLoraOps)
    assert backend.why_torch(groups(), torch.bfloat16, cpu) == "the device is cpu"


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (groups(), torch.float32, "the pool is torch.float32"),
        (groups(in_features=60), torch.bfloat16, "q_proj has in_features 60"),
        (groups(out_features=20), torch.float16, "q_proj has out_features 20"),
        (((LoraTarget("up_proj", 64, 64, 4),),), torch.float16, "up_proj has out_start 4"),
    ],
)
def test_what_the_kernels_cannot_take_goes_to_torch_with_a_reason(
    shape: tuple[tuple[LoraTarget, ...], ...], dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = backend.why_torch(shape, dtype, torch.device("cuda"))
    assert found is not None and found.startswith(reason)


def test_a_device_too_old_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.why_torch(groups(), torch.float16, torch.device("cuda")) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    assert backend.why_torch(groups(), torch.float16, torch.device("cuda")) is None


def test_without_cupy_torch_serves_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    reason = backend.why_torch(groups(), torch.float16, torch.device("cuda"))
    assert reason is not None and "pip install 'loraplane[cuda]'" in reason
