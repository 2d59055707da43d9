"""The order of eviction, kept up to date change by change, is the one that sorting all idle adapters anew would give."""

from hypothesis import given
from hypothesis import strategies as st

from dataplane.memory.adapter_states import (
    COPY_OVERHEAD_PAGES,
    HEAT_HALF_LIFE_S,
    STORE_COST_FACTOR,
    AdapterEntry,
    AdapterState,
)
from dataplane.memory.idle_adapters import IdleAdapters

NUM_ADAPTERS = 8


def make_entries() -> list[AdapterEntry]:
    """Adapters on the device, of different sizes."""
    states = [AdapterState.DEVICE] * NUM_ADAPTERS
    return [AdapterEntry(str(i), state, pages=tuple(range(1 + i % 3))) for i, state in enumerate(states)]


def expected_cost(entry: AdapterEntry, uses: list[float], now: float) -> float:
    """What evicting it costs for each page: its uses, each halved every half-life since, times the way back."""
    heat = sum(2.0 ** ((use - now) / HEAT_HALF_LIFE_S) for use in uses)
    return heat * (COPY_OVERHEAD_PAGES + len(entry.pages)) * (1 if entry.is_on_host else STORE_COST_FACTOR) / len(entry.pages)


MOVES = st.one_of(
    st.tuples(st.just("use"), st.integers(0, NUM_ADAPTERS - 1)),
    st.tuples(st.just("host"), st.integers(0, NUM_ADAPTERS - 1)),
    st.tuples(st.just("take"), st.integers(0, NUM_ADAPTERS - 1)),
    st.tuples(st.just("want"), st.permutations(range(NUM_ADAPTERS)).map(lambda order: order[:3])),
)


@given(moves=st.lists(MOVES, max_size=40), waits=st.lists(st.integers(1, 100), min_size=40, max_size=40))
def test_the_order_is_that_of_the_costs_whatever_happens(moves: list[tuple[str, int | list[int]]], waits: list[int]) -> None:
    idle, entries, now, wanted = IdleAdapters(), make_entries(), 1000.0, list[int]()
    uses: list[list[float]] = [[] for _ in entries]
    for (move, which), wait in zip(moves, waits, strict=False):
        now += wait
        if isinstance(which, list):
            wanted = which
            idle.set_wanted([str(i) for i in wanted])
            continue
        entry = entries[which]
        if move == "use":
            idle.update(entry, is_idle=False)
            entry.add_use(now)
            uses[which].append(now)
            idle.update(entry, is_idle=True)
        elif move == "host":
            entry.is_on_host = not entry.is_on_host
            idle.update_worth(entry)
        else:
            idle.update(entry, is_idle=False)
        idle.check_integrity()
    in_it = {int(entry.digest) for entry in idle}
    by_cost = sorted(in_it - set(wanted), key=lambda i: expected_cost(entries[i], uses[i], now))
    expected = by_cost + [i for i in reversed(wanted) if i in in_it]
    assert idle.num_unwanted_pages == sum(len(entries[i].pages) for i in by_cost)
    taken = []
    while (first := idle.next_of_all()) is not None:
        assert idle.next_unwanted() is (first if int(first.digest) in by_cost else None)
        taken.append(int(first.digest))
        idle.update(first, is_idle=False)
        idle.check_integrity()
    assert taken == expected
    assert idle.num_pages == idle.num_unwanted_pages == 0


def test_what_was_never_used_goes_first_and_what_is_still_copied_last() -> None:
    idle, (used, copied, unused, *_) = IdleAdapters(), make_entries()
    used.add_use(1.0)
    copied.state = AdapterState.COPYING
    for entry in (used, copied, unused):
        idle.update(entry, is_idle=True)
    order = []
    while (entry_or_none := idle.next_unwanted()) is not None:
        order.append(entry_or_none)
        idle.update(entry_or_none, is_idle=False)
    assert [entry is expected for entry, expected in zip(order, (unused, used, copied), strict=True)] == [True] * 3
