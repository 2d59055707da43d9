"""Chooses the attention backend: FlashInfer where it can do the work, else torch. Knows nothing of either."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from dataplane.attention.interface import AttentionBackend, AttentionShape
from dataplane.attention.torch_attention import TorchAttention

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128, 256)
_MIN_CAPABILITY = (8, 0)
# Where FlashInfer looks when nvcc is not on the path.
_DEFAULT_NVCC = Path("/usr/local/cuda/bin/nvcc")


def attention_backend(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """The backend for a model of that shape over a pool of that dtype. FlashInfer compiles its kernels here, once a machine."""
    if why_torch_attention(shape, dtype, device) is not None:
        return TorchAttention(shape.page_tokens)
    from dataplane.attention.flashinfer_attention import FlashInferAttention

    return FlashInferAttention(shape, dtype, device)


def why_torch_attention(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashInfer cannot serve that model, for a log line; None if it can."""
    if device.type != "cuda":
        return f"the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
    if dtype not in _DTYPES:
        return f"the pool is {dtype}, FlashInfer takes {' and '.join(map(str, _DTYPES))}"
    if shape.head_dim not in _HEAD_DIMS:
        return f"heads have {shape.head_dim} elements, FlashInfer takes {', '.join(map(str, _HEAD_DIMS))}"
    return _why_not_installed()


def _why_not_installed() -> str | None:
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed: pip install 'loraplane[cuda]'"
    can_compile = shutil.which("nvcc") is not None or _DEFAULT_NVCC.exists()
    if not can_compile and find_spec("flashinfer_jit_cache") is None:
        return "FlashInfer compiles its kernels and finds no nvcc: put one on the path, or install flashinfer-jit-cache"
    return None
