"""Chooses the attention backend: FlashInfer where it can do the work, else torch. Knows nothing of either."""

import torch

from dataplane.attention.interface import AttentionBackend, AttentionShape
from dataplane.attention.torch_attention import TorchAttention
from dataplane.flashinfer_library import why_no_flashinfer


def attention_backend(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """The backend for a model of that shape over a pool of that dtype. FlashInfer compiles its kernels here, once a machine."""
    if why_no_flashinfer(shape.head_dim, dtype, device) is not None:
        return TorchAttention(shape.page_tokens)
    from dataplane.attention.flashinfer_attention import FlashInferAttention

    return FlashInferAttention(shape, dtype, device)
