"""Brings the little that a step reads to the device, past all that is being loaded. Knows nothing of what is copied."""

import torch

# A copy of no more than this from ordinary memory is read at the call and travels with the command itself. CUDA promises
# that it does not wait; that it passes the copy engine was measured.
_PIECE_BYTES = 1 << 16


def upload(target: torch.Tensor, source: torch.Tensor) -> None:
    """Starts a copy to the device, behind what the current stream has to do. The source may be written again at once.

    Page-locked memory would be slower: its copies stand in one queue with those of adapters, whatever their streams, and wait
    for all that were started before, 2.4 ms for one of 128 MiB. These do not: 3 to 7 us alone and 11 to 25 us beside adapters
    that come at 55 GB/s, for 4 and for 64 KiB on an H200.

    target: [n] on the device. source: [n] of the same type in ordinary memory of the host.
    """
    assert len(target) == len(source) and target.dtype == source.dtype, f"{source.shape} {source.dtype} into {target.shape}"
    assert not source.is_pinned(), "a copy from page-locked memory waits for all that are being loaded"
    num_elements = _PIECE_BYTES // source.element_size()
    for i in range(0, len(source), num_elements):
        target[i : i + num_elements].copy_(source[i : i + num_elements], non_blocking=True)
