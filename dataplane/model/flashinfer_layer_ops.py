"""RMSNorm, rotary positions and SwiGLU with FlashInfer's kernels: one launch each, rounded once at the end.

Whether FlashInfer can serve a model is decided elsewhere.
"""

import torch

from dataplane.flashinfer_library import import_flashinfer
from dataplane.model.config import ModelConfig
from dataplane.model.layer_ops import LayerOps
from dataplane.model.rope import cos_sin_table


class FlashInferLayerOps(LayerOps):
    """Every kernel depends on the number of rows alone, so a captured graph of them serves all steps of as many rows."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Compiles the kernels, or loads them where this machine has compiled them before."""
        self._flashinfer = import_flashinfer()
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._table = cos_sin_table(config.rope, config.head_dim, config.max_position_embeddings, device)
        self._warm(config, dtype, device)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension."""
        normed: torch.Tensor = self._flashinfer.rmsnorm(x, weight, self._eps)
        return normed

    def add_norm(self, x: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Adds x to hidden in place and returns the norm of the sum, which lies where x did."""
        self._flashinfer.fused_add_rmsnorm(x, hidden, weight, self._eps)
        return x

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """As `norm`, of each head, in place."""
        self._flashinfer.rmsnorm(x, weight, self._eps, out=x)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The positions themselves: cosines and sines of all that there can be lie in a table."""
        return (positions,)

    def rotate(self, q: torch.Tensor, k: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> None:
        """Turns queries and keys to their positions in place."""
        self._flashinfer.apply_rope_with_cos_sin_cache_inplace(angles[0], q, k, self._head_dim, self._table)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        product: torch.Tensor = self._flashinfer.silu_and_mul(gate_up)
        return product

    def _warm(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Runs everything once: a step must not wait for a compiler."""
        x, weight = (torch.ones(shape, dtype=dtype, device=device) for shape in ((1, config.hidden_size), config.hidden_size))
        heads = torch.ones((1, config.num_heads, config.head_dim), dtype=dtype, device=device)
        self.add_norm(self.norm(x, weight), x, weight)
        self.norm_heads(heads, torch.ones(config.head_dim, dtype=dtype, device=device))
        self.rotate(heads, heads.clone(), (torch.zeros(1, dtype=torch.int32, device=device),))
        self.swiglu(torch.ones((1, 2 * config.intermediate_size), dtype=dtype, device=device))
