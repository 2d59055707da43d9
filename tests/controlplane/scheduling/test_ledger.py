"""The page ledger alone: its sums, its formulas, and who fits. Against a pool it is tested in test_scheduler_properties."""

from collections.abc import Callable
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.messages import AdapterRef
from controlplane.scheduling.ledger import Ledger

PAGE_TOKENS = 16


class Op(NamedTuple):
    """One thing that happens to a ledger; the numbers choose among what is possible."""

    kind: str
    a: int
    b: int


OPS = st.lists(
    st.builds(
        Op, st.sampled_from(["charge", "grow", "release", "abort", "apply", "pin"]), st.integers(0, 50), st.integers(0, 50)
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(OPS)
def test_sums_always_equal_what_is_on_the_books(ops: list[Op]) -> None:
    ledger = Ledger(num_pages=100, page_tokens=PAGE_TOKENS)
    live: list[int] = []
    sequence, next_key = 0, 1
    for kind, a, b in ops:
        if kind == "charge":
            adapter = AdapterRef("x", f"digest-{a % 4}", 1 + a % 4) if a % 5 else None
            ledger.charge(next_key, a + 1, a + 1 + b, adapter)
            live.append(next_key)
            next_key += 1
        elif kind == "grow" and live:
            for _ in range(b):
                ledger.grow(live[a % len(live)])
        elif kind == "release" and live:
            ledger.release(live.pop(a % len(live)))
        elif kind == "abort" and live:
            sequence += 1
            ledger.release_when_applied(live.pop(a % len(live)), sequence)
        elif kind == "apply":
            ledger.applied(sequence - b % 3)
        elif kind == "pin":
            pages = {f"digest-{n}": 1 + n for n in range(4) if a >> n & 1}
            ledger.set_pinned(list(pages), pages)
        ledger.check_integrity()
    for key in live:
        ledger.release(key)
    ledger.applied(sequence)
    ledger.set_pinned([], {})
    assert (ledger.used_pages, ledger.num_requests, ledger.lookahead_pages) == (0, 0, 0)


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_request_is_charged_for_its_tokens_and_one_more_but_never_beyond_its_longest(prompt: int, max_tokens: int) -> None:
    ledger = Ledger(num_pages=1000, page_tokens=PAGE_TOKENS)
    ledger.charge(1, prompt, prompt + max_tokens, None)
    for num_tokens in range(prompt, prompt + max_tokens + 1):
        longest = -(-(prompt + max_tokens) // PAGE_TOKENS)
        assert ledger.kv_pages == min(-(-(num_tokens + 1) // PAGE_TOKENS), longest)
        ledger.grow(1)


def test_an_aborted_request_keeps_its_pages_until_the_update_is_applied(adapter: Callable[..., AdapterRef]) -> None:
    ledger = Ledger(num_pages=10, page_tokens=PAGE_TOKENS)
    ledger.charge(1, 40, 100, adapter(1))
    ledger.release_when_applied(1, sequence=7)
    ledger.applied(6)
    assert (ledger.kv_pages, ledger.adapter_pages, ledger.num_requests) == (3, 2, 1)
    ledger.applied(7)
    assert (ledger.kv_pages, ledger.adapter_pages, ledger.num_requests) == (0, 0, 0)


def test_dying_requests_do_not_count_as_a_shortage(adapter: Callable[..., AdapterRef]) -> None:
    ledger = Ledger(num_pages=4, page_tokens=PAGE_TOKENS)
    ledger.charge(1, 16, 64, adapter(1))
    ledger.charge(2, 16, 64, None)
    assert ledger.shortage == 2
    ledger.release_when_applied(2, sequence=1)
    assert ledger.shortage == 0


def test_an_adapter_is_charged_once_however_many_use_it(adapter: Callable[..., AdapterRef]) -> None:
    ledger = Ledger(num_pages=10, page_tokens=PAGE_TOKENS)
    for key in (1, 2, 3):
        ledger.charge(key, 4, 8, adapter(1, num_pages=3))
    assert (ledger.adapter_pages, ledger.kv_pages) == (3, 3)
    assert ledger.can_admit(4, 8, adapter(1, num_pages=3))
    ledger.charge(4, 4, 8, None)
    ledger.charge(5, 4, 8, None)
    assert not ledger.can_admit(4, 8, adapter(2, num_pages=2))  # 8 used, 1 for its KV: only 1 is left for the adapter


def test_admission_leaves_one_page_for_every_running_request() -> None:
    ledger = Ledger(num_pages=6, page_tokens=PAGE_TOKENS)
    ledger.charge(1, 4, 100, None)
    assert ledger.can_admit(4, 100, None)
    ledger.charge(2, 4, 100, None)
    assert ledger.can_admit(4, 100, None)
    ledger.charge(3, 4, 100, None)  # 3 pages used, 3 looked ahead for
    assert not ledger.can_admit(4, 100, None)
    assert not ledger.can_admit(4, 16, None)


def test_a_request_that_fills_the_pool_exactly_fits_when_it_is_alone(adapter: Callable[..., AdapterRef]) -> None:
    ledger = Ledger(num_pages=6, page_tokens=PAGE_TOKENS)
    assert ledger.can_admit(4, 4 * PAGE_TOKENS, adapter(1))
    assert ledger.can_ever_admit(4 * PAGE_TOKENS, adapter(1))
    assert not ledger.can_ever_admit(4 * PAGE_TOKENS + 1, adapter(1))


def test_pinned_adapters_take_pages_from_everybody_but_their_own_requests(adapter: Callable[..., AdapterRef]) -> None:
    ledger = Ledger(num_pages=6, page_tokens=PAGE_TOKENS)
    pinned = adapter(1, num_pages=3)
    ledger.set_pinned([pinned.digest, "not on the device"], {pinned.digest: 3})
    assert ledger.adapter_pages == 3
    assert ledger.can_ever_admit(3 * PAGE_TOKENS, pinned)
    assert not ledger.can_ever_admit(3 * PAGE_TOKENS, adapter(2, num_pages=1))
