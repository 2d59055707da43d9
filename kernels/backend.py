"""Chooses the backend of the LoRA operation: the CUDA kernels where they can do the work, else torch. Knows nothing of either."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from kernels.lora import LoraOps, LoraTarget
from kernels.lora_torch import TorchLoraOps
from kernels.plan_layout import LoraLimits

_DTYPES = (torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)
# A vector of 16 bytes: rows and columns are read and written in these.
_VECTOR_ELEMS = 8


def lora_ops(groups: Sequence[tuple[LoraTarget, ...]], dtype: torch.dtype, device: torch.device, limits: LoraLimits) -> LoraOps:
    """The backend for a model whose inputs have these targets, and for steps within these limits."""
    if why_torch(groups, dtype, device) is not None:
        return TorchLoraOps()
    from kernels.lora_cuda import CudaLoraOps

    return CudaLoraOps(groups, dtype, device, limits)


def why_torch(groups: Sequence[tuple[LoraTarget, ...]], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the CUDA kernels cannot serve these targets, for a log line; None if they can."""
    if device.type != "cuda":
        return f"the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
    reason = _why_not_supported(groups, dtype)
    if reason is None and find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'loraplane[cuda]'"
    return reason


def _why_not_supported(groups: Sequence[tuple[LoraTarget, ...]], dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"the pool is {dtype}, the kernels take {' and '.join(map(str, _DTYPES))}"
    for target in (target for group in groups for target in group):
        for name in ("in_features", "out_features", "out_start"):
            if getattr(target, name) % _VECTOR_ELEMS:
                return f"{target.module} has {name} {getattr(target, name)}, which is no multiple of {_VECTOR_ELEMS}"
    return None
