"""FlashInfer as the data plane uses it: whether it can serve a model on a device, and its import.

Knows nothing of what its kernels compute.
"""

import importlib
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128, 256)
_MIN_CAPABILITY = (8, 0)
# Where FlashInfer looks when nvcc is not on the path.
_DEFAULT_NVCC = Path("/usr/local/cuda/bin/nvcc")


def why_no_flashinfer(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashInfer cannot serve a model with such heads, for a log line; None if it can."""
    if device.type != "cuda":
        return f"the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
    if dtype not in _DTYPES:
        return f"the model is {dtype}, FlashInfer takes {' and '.join(map(str, _DTYPES))}"
    if head_dim not in _HEAD_DIMS:
        return f"heads have {head_dim} elements, FlashInfer takes {', '.join(map(str, _HEAD_DIMS))}"
    return _why_not_installed()


def import_flashinfer() -> Any:
    """The module. By name: it is installed where there is a GPU, and types are checked where there is none."""
    with warnings.catch_warnings():
        # Deprecations in what it imports are its own affair.
        warnings.simplefilter("ignore")
        return importlib.import_module("flashinfer")


def _why_not_installed() -> str | None:
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed: pip install 'loraplane[cuda]'"
    can_compile = shutil.which("nvcc") is not None or _DEFAULT_NVCC.exists()
    if not can_compile and find_spec("flashinfer_jit_cache") is None:
        return "FlashInfer compiles its kernels and finds no nvcc: put one on the path, or install flashinfer-jit-cache"
    return None
