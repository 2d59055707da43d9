"""Keeps the likeliest tokens of each row of weights: a CUDA kernel and its torch reference. Knows nothing of requests."""

from collections.abc import Callable
from importlib.util import find_spec

import torch

# Called with weights, which it changes, top_k and top_p, as `truncate_torch` is.
Truncation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

# As in csrc/truncation.cu.
_NUM_THREADS = 512


def truncation(device: torch.device) -> Truncation:
    """The kernel where it can run, else torch, which sorts every row and takes many times as long. Both give the same numbers."""
    if device.type != "cuda" or find_spec("cupy") is None:
        return truncate_torch
    return CudaTruncation(device)


def truncate_torch(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> None:
    """Keeps the top_k largest weights of a row, and of these the fewest whose sum reaches the share top_p; the rest become 0.

    Of equals the lowest token ids are kept.

    Semantics: order = argsort(-row, kind="stable"); most = where(arange(vocab) < top_k, row[order], 0);
        row[order] = where(cumsum(most) - most < top_p * sum(most), most, 0)

    weights: [num_rows, vocab] int64, not negative, with sums below 2**62; contiguous.
    top_k: [num_rows] int64, from 1; from vocab up it keeps all.
    top_p: [num_rows] float64, above 0; 1 keeps all.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(weights.shape[1], device=weights.device) >= top_k.unsqueeze(1), 0)
    sums = ordered.cumsum(dim=-1)
    total = sums[:, -1]
    # A token stays while those before it fall short of this. 1 keeps all, whatever the rounding; the first always stays.
    wanted = torch.where(top_p < 1, (top_p * total.double()).ceil().long(), total).clamp_(min=1)
    ordered.masked_fill_(sums - ordered >= wanted.unsqueeze(1), 0)
    weights.scatter_(1, order, ordered)


class CudaTruncation:
    """The same in one launch on torch's current stream. It is compiled here."""

    def __init__(self, device: torch.device) -> None:
        # CuPy is installed only where there is a GPU.
        from kernels.cuda_launch import INT, POINTER, CudaLauncher
        from kernels.cuda_module import cuda_kernel

        with torch.cuda.device(device):
            # It reads no pool: the dtype is any that there is.
            kernel = cuda_kernel("truncation.cu", "truncate_rows", torch.bfloat16)
            self._launcher = CudaLauncher(kernel, _NUM_THREADS, 0, (POINTER, POINTER, POINTER, INT))

    def __call__(self, weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> None:
        """As `truncate_torch`."""
        assert weights.is_contiguous() and weights.dtype == torch.int64, f"{weights.dtype} with strides {weights.stride()}"
        assert top_k.dtype == torch.int64 and top_p.dtype == torch.float64, f"top_k is {top_k.dtype}, top_p {top_p.dtype}"
        num_rows, vocab_size = weights.shape
        arguments = (weights.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), vocab_size)
        self._launcher.launch(num_rows, arguments, may_overlap=False)
