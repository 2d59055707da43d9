"""Pages arrive where they were sent, in every layer, and nothing else changes. Needs a GPU."""

from random import Random

import pytest
import torch

from kernels.page_copy import PageCopier

pytestmark = pytest.mark.gpu

NUM_LAYERS = 3
# Rows of a 2-D copy lie no farther apart.
MAX_PITCH_BYTES = 2**31 - 1

RUNS = {
    "one run": [(0, 5, 12)],
    "single pages": [(i, page, 1) for i, page in enumerate([17, 2, 3, 19, 0, 8, 7, 6, 13, 11, 10, 15])],
    "runs": [(0, 8, 5), (5, 0, 1), (6, 14, 6)],
    "the whole pool": [(0, 0, 20)],
    "some of the source": [(3, 4, 2), (9, 1, 1)],
}


@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(("dtype", "page_elems"), [(torch.bfloat16, 8 * 4097), (torch.float32, 12)])
def test_pages_arrive_where_they_were_sent(
    runs: list[tuple[int, int, int]], dtype: torch.dtype, page_elems: int, is_pinned: bool
) -> None:
    pool = torch.randn(NUM_LAYERS, 20, page_elems, device="cuda").to(dtype)
    source = torch.randn(NUM_LAYERS, max(first + length for first, _, length in runs), page_elems).to(dtype)
    source = source.pin_memory() if is_pinned else source
    expected = pool.cpu()
    for first, page, length in runs:
        expected[:, page : page + length] = source[:, first : first + length]
    PageCopier(pool).start(source, runs, torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert torch.equal(pool.cpu(), expected)


def test_a_layer_may_be_wider_than_a_two_dimensional_copy_allows() -> None:
    page_elems, num_pages = 1 << 17, 8300
    assert num_pages * page_elems * 2 > MAX_PITCH_BYTES
    if torch.cuda.mem_get_info()[0] < 3 * num_pages * page_elems * 2:
        pytest.skip("needs 6.5 GB of free device memory")
    pool = torch.zeros(2, num_pages, page_elems, dtype=torch.bfloat16, device="cuda")
    source = torch.randn(2, 6, page_elems).to(torch.bfloat16).pin_memory()
    pages = [8299, 0, *range(4096, 4100)]
    PageCopier(pool).start(source, [(0, 8299, 1), (1, 0, 1), (2, 4096, 4)], torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert torch.equal(pool[:, pages].cpu(), source)
    pool[:, pages] = 0
    assert not bool(pool.any()), "a page of somebody else was written"


def test_many_copies_of_one_copier_are_each_their_own() -> None:
    pool = torch.zeros(NUM_LAYERS, 64, 4096, device="cuda")
    copier, stream = PageCopier(pool), torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    sources = [torch.full((NUM_LAYERS, 2, 4096), float(i + 1)).pin_memory() for i in range(32)]
    pages = Random(0).sample(range(64), 64)
    for i, source in enumerate(sources):
        copier.start(source, [(0, pages[2 * i], 1), (1, pages[2 * i + 1], 1)], stream)
    torch.cuda.synchronize()
    assert torch.equal(pool[0, pages, 0].cpu(), torch.arange(32).repeat_interleave(2) + 1.0)
