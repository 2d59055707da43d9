"""Chooses who computes norms, rotary positions and SwiGLU: FlashInfer where it can, else torch. Knows nothing of either."""

import torch

from dataplane.flashinfer_library import why_no_flashinfer
from dataplane.model.config import ModelConfig
from dataplane.model.layer_ops import LayerOps, TorchLayerOps

# A vector of 16 bytes: FlashInfer's kernels read rows in these.
_VECTOR_ELEMS = 8


def layer_ops(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LayerOps:
    """The operations of a model served in that dtype. FlashInfer compiles its kernels here, once a machine."""
    if why_torch_layer_ops(config, dtype, device) is not None:
        return TorchLayerOps(config, device)
    from dataplane.model.flashinfer_layer_ops import FlashInferLayerOps

    return FlashInferLayerOps(config, dtype, device)


def why_torch_layer_ops(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashInfer cannot compute them, for a log line; None if it can."""
    reason = why_no_flashinfer(config.head_dim, dtype, device)
    if reason is not None:
        return reason
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % _VECTOR_ELEMS:
            return f"{name} is {getattr(config, name)}, which is no multiple of {_VECTOR_ELEMS}"
    return None
