"""What a decoder layer computes beside matrices, LoRA and attention: RMSNorm, rotary positions, SwiGLU; and all that in torch.

The torch operations are equal to transformers in every rounding (norms and angles in fp32).
"""

from abc import ABC, abstractmethod

import torch
from torch.nn import functional

from dataplane.model.config import ModelConfig
from dataplane.model.rope import cos_sin, inverse_frequencies, rotate


class LayerOps(ABC):
    """The operations on one step's rows. T below is their number; all tensors have the dtype of the model."""

    @abstractmethod
    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension. x: [T, hidden_size]."""

    @abstractmethod
    def add_norm(self, x: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Adds x to hidden in place and returns the norm of the sum; may overwrite x. x, hidden: [T, hidden_size]."""

    @abstractmethod
    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """As `norm`, of each head, in place. x: [T, num_heads, head_dim], rows any distance apart."""

    @abstractmethod
    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What `rotate` needs of a step's positions, once for all layers. positions: [T] int32."""

    @abstractmethod
    def rotate(self, q: torch.Tensor, k: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> None:
        """Turns queries and keys to their positions in place; dimension i pairs with i + head_dim / 2.

        q, k: [T, heads, head_dim], rows any distance apart.
        """

    @abstractmethod
    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. gate_up: [T, 2 * intermediate_size], gate first."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension: the quotient in fp32, the product in the dtype of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


class TorchLayerOps(LayerOps):
    """In torch, on any device."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._eps = config.rms_norm_eps
        self._frequencies = inverse_frequencies(config.rope, config.head_dim, device)
        self._attention_factor = config.rope.attention_factor

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension."""
        return rms_norm(x, weight, self._eps)

    def add_norm(self, x: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Adds x to hidden in place and returns the norm of the sum."""
        return rms_norm(hidden.add_(x), weight, self._eps)

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """As `norm`, of each head, in place."""
        x.copy_(rms_norm(x, weight, self._eps))

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Cosine and sine of every row's angles."""
        return cos_sin(self._frequencies, self._attention_factor, positions, dtype)

    def rotate(self, q: torch.Tensor, k: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> None:
        """Turns queries and keys to their positions in place."""
        cos, sin = angles
        q.copy_(rotate(q, cos, sin))
        k.copy_(rotate(k, cos, sin))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
