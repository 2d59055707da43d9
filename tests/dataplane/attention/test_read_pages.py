"""Which pages a request reads: all of its own, those of its window, and the padding page behind."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dataplane.attention.read_pages import ReadPages

PAGE_TOKENS = 16
REQUESTS = [(1, 1), (16, 1), (17, 1), (100, 1), (40, 7), (64, 64), (130, 33)]


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 24, 130, 5000])
def test_a_request_reads_the_pages_that_its_rows_may_attend_to(window: int | None, step_inputs: Callable[..., Any]) -> None:
    free = random.Random(0).sample(range(100), 100)
    tables = [[free.pop() for _ in range(-(-length // PAGE_TOKENS))] for length, _ in REQUESTS]
    step = step_inputs(REQUESTS, tables, PAGE_TOKENS, "cpu").host
    pages = ReadPages.of(step, PAGE_TOKENS, window)
    for r, ((length, num_rows), table) in enumerate(zip(REQUESTS, tables, strict=True)):
        first_key = 0 if window is None else max(0, length - num_rows - window + 1)
        found = pages.indices[pages.indptr[r] : pages.indptr[r + 1]].tolist()
        assert found == table[first_key // PAGE_TOKENS :]
        assert (len(found) - 1) * PAGE_TOKENS + pages.last_page_lens[r] == length - first_key // PAGE_TOKENS * PAGE_TOKENS


def test_padding_reads_one_token_of_the_padding_page(step_inputs: Callable[..., Any]) -> None:
    step = step_inputs([(20, 1), (3, 1)], [[5, 6], [7]], PAGE_TOKENS, "cpu").host
    pages = ReadPages.of(step, PAGE_TOKENS, None).padded(5, 99)
    assert pages.indptr.tolist() == [0, 2, 3, 4, 5, 6]
    assert pages.indices.tolist() == [5, 6, 7, 99, 99, 99]
    assert pages.last_page_lens.tolist() == [4, 3, 1, 1, 1]
    assert all(array.dtype == np.int32 for array in (pages.indptr, pages.indices, pages.last_page_lens))
    unpadded = ReadPages.of(step, PAGE_TOKENS, None)
    assert unpadded.padded(2, 99).indptr.tolist() == unpadded.indptr.tolist()
