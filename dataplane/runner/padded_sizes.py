"""To how many rows a step is padded, so that few captured graphs serve all steps."""

from bisect import bisect_left
from collections.abc import Iterable

# Close together: a row of padding costs what a row of a step does, from some hundred rows on 0.02 ms with 7B parameters.
_SMALL_DECODES = (1, 2, 4, 8, 16, 24, 32, *range(48, 257, 16))
_DECODE_STEP = 32
_SMALL_MIXED = tuple(range(32, 513, 32))
_MIXED_STEP = 64
# Above, a step takes longer to compute than to launch.
_MAX_MIXED_ROWS = 768


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """For steps of decodes alone, ascending; the last one holds the largest batch."""
    return _up_to(max_num_seqs, (*_SMALL_DECODES, *range(_SMALL_DECODES[-1] + _DECODE_STEP, max_num_seqs, _DECODE_STEP)))


def mixed_sizes(token_budget: int) -> tuple[int, ...]:
    """For steps with prompts, ascending; larger steps are not padded."""
    largest = min(token_budget, _MAX_MIXED_ROWS)
    return _up_to(largest, (*_SMALL_MIXED, *range(_SMALL_MIXED[-1] + _MIXED_STEP, largest, _MIXED_STEP)))


def smallest_size(sizes: tuple[int, ...], num_tokens: int) -> int | None:
    """The size that wastes least; None if all are too small."""
    index = bisect_left(sizes, num_tokens)
    return sizes[index] if index < len(sizes) else None


def _up_to(largest: int, sizes: Iterable[int]) -> tuple[int, ...]:
    return (*(size for size in sizes if size < largest), largest)
