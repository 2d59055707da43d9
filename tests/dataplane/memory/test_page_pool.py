"""Laws of the page allocator."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.memory.page_pool import PageKind, PageOwner, PagePool, page_runs

A = PageOwner(PageKind.KV, 1)
B = PageOwner(PageKind.ADAPTER, "digest")


def test_a_request_for_no_page_gives_no_page() -> None:
    pool = PagePool(4)
    assert pool.allocate(0, A) == ()
    pool.check_integrity()


def test_more_pages_than_are_free_gives_none_and_takes_none() -> None:
    pool = PagePool(4)
    pool.allocate(2, A)
    assert pool.allocate(3, B) is None
    assert pool.num_free == 2
    pool.check_integrity()


def test_pages_are_one_run_when_a_run_is_free() -> None:
    pool = PagePool(16)
    first = pool.allocate(4, A)
    pool.allocate(4, B)
    assert first is not None
    pool.free(first, A)
    # 4 pages are free at the front and 8 at the back: 6 fit in the back alone.
    assert pool.allocate(6, A) == tuple(range(8, 14))
    pool.check_integrity()


def test_freed_pages_are_reused_before_new_ones() -> None:
    pool = PagePool(16)
    pages = [pool.allocate(1, A) for _ in range(6)]
    assert pages[2] is not None
    pool.free(pages[2], A)
    assert pool.allocate(1, B) == pages[2]
    pool.check_integrity()


def test_scattered_pages_are_given_when_no_run_is_long_enough() -> None:
    pool = PagePool(6)
    pages = [pool.allocate(1, A) for _ in range(6)]
    for i in (0, 2, 3, 5):
        held = pages[i]
        assert held is not None
        pool.free(held, A)
    given = pool.allocate(4, B)
    assert given is not None
    assert sorted(given) == [0, 2, 3, 5]
    assert given[:2] == (2, 3), "the longest run first, so that there are few"
    pool.check_integrity()


def test_freeing_what_another_holds_is_a_bug() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2, A)
    assert pages is not None
    with pytest.raises(AssertionError, match="held by"):
        pool.free(pages, B)


def test_freeing_twice_is_a_bug() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2, A)
    assert pages is not None
    pool.free(pages, A)
    with pytest.raises(AssertionError, match="held by None"):
        pool.free(pages, A)


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)


def test_runs_split_where_neighbours_do_not_follow_each_other() -> None:
    assert list(page_runs([4, 5, 6, 9, 8, 7])) == [(0, 3), (3, 1), (4, 1), (5, 1)]
    assert list(page_runs([])) == []


class PoolMachine(RuleBasedStateMachine):
    """The pool against a dictionary of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(24)
        self.held: list[tuple[PageOwner, tuple[int, ...]]] = []

    @rule(num_pages=st.integers(0, 30), is_kv=st.booleans(), name=st.integers(0, 3))
    def allocate(self, num_pages: int, is_kv: bool, name: int) -> None:
        owner = PageOwner(PageKind.KV, name) if is_kv else PageOwner(PageKind.ADAPTER, str(name))
        num_free = self.pool.num_free
        pages = self.pool.allocate(num_pages, owner)
        assert (pages is None) == (num_pages > num_free)
        if pages is not None:
            assert len(pages) == num_pages
            self.held.append((owner, pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        cut = data.draw(st.integers(0, len(pages)))
        self.pool.free(pages[:cut], owner)
        if pages[cut:]:
            self.held.append((owner, pages[cut:]))

    @invariant()
    def nobody_shares_a_page(self) -> None:
        self.pool.check_integrity()
        pages = [page for _, held in self.held for page in held]
        assert len(pages) == len(set(pages)) == 24 - self.pool.num_free
        for kind in PageKind:
            assert self.pool.num_held(kind) == sum(len(held) for owner, held in self.held if owner.kind is kind)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
