"""Padding: to the smallest size that holds a step, never past the largest step there is."""

import pytest

from dataplane.runner.padded_sizes import decode_sizes, mixed_sizes, smallest_size


@pytest.mark.parametrize("largest", [1, 2, 3, 31, 32, 33, 200, 256, 257, 400, 768, 1000])
def test_sizes_ascend_to_the_largest_step(largest: int) -> None:
    for sizes in (decode_sizes(largest), mixed_sizes(largest)):
        assert list(sizes) == sorted(set(sizes)) and sizes[0] >= 1
    assert decode_sizes(largest)[-1] == largest
    assert mixed_sizes(largest)[-1] == min(largest, 768)


@pytest.mark.parametrize(("sizes", "most_padding"), [(decode_sizes(300), 31), (mixed_sizes(700), 63)])
def test_a_step_gets_the_smallest_size_that_holds_it(sizes: tuple[int, ...], most_padding: int) -> None:
    for num_tokens in range(1, sizes[-1] + 1):
        size = smallest_size(sizes, num_tokens)
        assert size == min(s for s in sizes if s >= num_tokens)
        assert size - num_tokens <= most_padding
    assert smallest_size(sizes, sizes[-1] + 1) is None
