"""Laws of adapters' life on a data plane: who is fetched, copied, kept and evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from dataplane.engine.inbox import AdapterFetched, HostImageEvicted
from dataplane.memory.adapter_states import ALLOWED_MOVES, HEAT_HALF_LIFE_S, AdapterEntry, AdapterState, Readiness
from dataplane.memory.residency import MAX_COPIES_AHEAD, MAX_FETCHES_AHEAD
from protos.planes import AdapterPlace

if TYPE_CHECKING:
    from tests.dataplane.conftest import EngineWorld


class ResidencyWorld:
    """Residency with fakes around it. Adapters take as many pages as their name is long."""

    def __init__(self, world: EngineWorld) -> None:
        self.pool = world.pool
        self.host = world.host
        self.residency = world.residency
        self.clock = world.clock
        self.device = world.device
        self._inbox = world.inbox

    def settle(self) -> None:
        """Handles what other threads sent."""
        for message in self._inbox.take(0):
            match message:
                case AdapterFetched(digest, result):
                    self.residency.complete_fetch(digest, result)
                case HostImageEvicted(digest):
                    self.residency.complete_host_eviction(digest)

    def load(self, digest: str) -> None:
        """Brings an adapter to the device and leaves it there, held."""
        self.residency.acquire(digest)
        self.settle()
        assert self.residency.prepare(digest, may_allocate=True) is Readiness.READY

    def use(self, *digests: str) -> None:
        """A request of each came and went."""
        for digest in digests:
            self.load(digest)
            self.residency.release(digest)

    def prefetch(self, *digests: str, num_reserved_pages: int = 0) -> None:
        """Wants these, and gives them time."""
        self.residency.set_prefetch(digests)
        for _ in range(3):
            self.residency.advance_prefetch(num_reserved_pages)
            self.settle()

    def on_device(self) -> set[str]:
        return {e.digest for e in self.residency.snapshot() if e.place is AdapterPlace.DEVICE}

    def place(self, digest: str) -> AdapterPlace:
        places = {e.digest: e.place for e in self.residency.snapshot()}
        return places.get(digest, AdapterPlace.NONE)


MakeWorld = Callable[..., ResidencyWorld]


@pytest.fixture
def make_world(make_world: type[EngineWorld]) -> Iterator[MakeWorld]:
    """Makes worlds whose books are checked at the end of the test."""
    made: list[ResidencyWorld] = []

    def make(num_pages: int, **options: Any) -> ResidencyWorld:
        world = make_world(num_pages=num_pages, image_pages=len, **options)
        made.append(ResidencyWorld(world))
        return made[-1]

    yield make
    for world in made:
        world.pool.check_integrity()
        world.residency.check_integrity()


def test_a_move_that_the_table_does_not_name_is_a_bug() -> None:
    entry = AdapterEntry("x")
    with pytest.raises(AssertionError, match="no move from NONE to DEVICE"):
        entry.move(AdapterState.DEVICE)
    assert ALLOWED_MOVES.keys() == set(AdapterState)


def test_an_adapter_passes_through_every_place_and_each_is_told(make_world: MakeWorld) -> None:
    world = make_world(10)
    world.host.answers_at_once = False
    world.residency.acquire("xx")
    assert [e.place for e in world.residency.take_events()] == [AdapterPlace.FETCHING]
    assert world.residency.prepare("xx", may_allocate=True) is Readiness.LOADING
    world.host.deliver()
    world.settle()
    assert [e.place for e in world.residency.take_events()] == [AdapterPlace.HOST]
    assert world.residency.prepare("xx", may_allocate=True) is Readiness.READY
    (event,) = world.residency.take_events()
    assert (event.place, event.num_pages, event.size_bytes) == (AdapterPlace.DEVICE, 2, 8)
    assert world.residency.take_events() == ()


def test_requests_that_want_one_adapter_share_one_fetch(make_world: MakeWorld) -> None:
    world = make_world(10)
    world.host.answers_at_once = False
    for _ in range(3):
        world.residency.acquire("x")
    assert world.host.num_fetches == 1


def test_an_adapter_in_use_is_never_evicted(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.load("aa")
    world.residency.acquire("bbb")
    world.settle()
    assert world.residency.prepare("bbb", may_allocate=True) is Readiness.STARVED
    assert not world.residency.reclaim(3)
    assert world.on_device() == {"aa"}
    world.residency.release("aa")
    assert world.residency.prepare("bbb", may_allocate=True) is Readiness.READY
    assert world.on_device() == {"bbb"}


def test_a_second_user_keeps_an_adapter_that_the_first_released(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.load("aa")
    world.load("aa")
    world.residency.release("aa")
    assert world.residency.num_idle_pages == 0
    world.residency.release("aa")
    assert world.residency.num_idle_pages == 2


def test_a_pinned_adapter_is_never_evicted_until_it_is_unpinned(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.use("aa")
    world.residency.set_pinned(["aa"])
    assert world.residency.num_idle_pages == 0
    assert not world.residency.reclaim(4)
    world.residency.set_pinned([])
    assert world.residency.reclaim(4)
    assert world.on_device() == set()


def test_a_pinned_adapter_is_loaded_without_a_request(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.residency.set_pinned(["aa"])
    world.prefetch()
    assert world.on_device() == {"aa"}


def test_without_leave_to_allocate_nothing_is_taken(make_world: MakeWorld) -> None:
    world = make_world(10)
    world.residency.acquire("x")
    world.settle()
    assert world.residency.prepare("x", may_allocate=False) is Readiness.STARVED
    assert world.pool.num_free == 10


def test_what_would_not_suffice_is_not_evicted(make_world: MakeWorld) -> None:
    world = make_world(6)
    world.load("aa")
    world.use("bb")
    assert not world.residency.reclaim(5)
    assert world.on_device() == {"aa", "bb"}


def test_the_rarely_used_goes_before_the_often_used(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.use("aa", "bb", "aa")
    assert world.residency.reclaim(1)
    assert world.on_device() == {"aa"}


def test_an_old_use_counts_less_than_a_new_one(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.use("aa", "aa")
    world.clock.now = 5 * HEAT_HALF_LIFE_S
    world.use("bb")
    assert world.residency.reclaim(1)
    assert world.on_device() == {"bb"}


def test_what_the_host_still_has_goes_before_what_must_be_read_again(make_world: MakeWorld) -> None:
    world = make_world(4, host_capacity=1)
    world.use("aa", "bb")
    assert world.residency.reclaim(1)
    assert world.on_device() == {"aa"}
    assert world.place("bb") is AdapterPlace.HOST


def test_what_will_be_needed_soonest_is_evicted_last(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.use("a", "b", "b", "b", "c", "c")
    world.residency.set_prefetch(["a", "c"])
    for expected in ({"a", "c"}, {"a"}, set()):
        assert world.residency.reclaim(world.pool.num_free + 1)
        assert world.on_device() == expected


def test_prefetch_fills_free_room_but_leaves_the_reserve(make_world: MakeWorld) -> None:
    world = make_world(7)
    world.prefetch("aa", "bb", "cc", num_reserved_pages=2)
    assert world.on_device() == {"aa", "bb"}
    assert world.place("cc") is AdapterPlace.HOST
    assert world.residency.num_idle_pages == 4, "it is there for whoever needs the room"


def test_prefetch_pushes_out_only_what_is_not_wanted(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.use("aa", "bb")
    world.prefetch("bb", "cc", "dd")
    assert world.on_device() == {"bb", "cc"}


def test_prefetch_copies_nothing_past_the_first_that_finds_no_room(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.load("aa")
    world.prefetch("bbb", "c")
    assert world.on_device() == {"aa"}, "the small one must not take what the soonest waits for"


def test_a_full_device_does_not_keep_the_rest_of_the_list_in_the_store(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.load("aaaa")
    world.prefetch(*"bcdefgh")
    assert {world.place(digest) for digest in "bcdefgh"} == {AdapterPlace.HOST}


def test_a_host_cache_smaller_than_the_list_is_not_filled_in_circles(make_world: MakeWorld) -> None:
    world = make_world(2, host_capacity=2)
    world.load("xx")
    for _ in range(10):
        world.prefetch("a", "b", "c", "d")
    assert world.host.num_fetches == 5


def test_a_prefetch_that_fails_is_told_and_not_tried_again_while_listed(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.host.errors["bad"] = "truncated"
    world.prefetch("bad")
    world.prefetch("bad", "a")
    assert world.host.num_fetches == 2
    assert next((e.digest, e.place, e.error) for e in world.residency.take_events()) == ("bad", AdapterPlace.FAILED, "truncated")


def test_an_image_that_the_host_cache_dropped_still_reaches_its_request(make_world: MakeWorld) -> None:
    world = make_world(10, host_capacity=1)
    for digest in ("a", "b"):
        world.residency.acquire(digest)
    world.settle()
    assert world.host.get("a") is None
    assert world.residency.prepare("a", may_allocate=True) is Readiness.READY
    assert world.host.num_fetches == 2


def test_an_image_evicted_from_the_host_is_gone_when_nobody_holds_it(make_world: MakeWorld) -> None:
    world = make_world(10, host_capacity=1)
    world.residency.acquire("a")
    world.settle()
    world.residency.release("a")
    world.residency.take_events()
    world.residency.acquire("b")
    world.settle()
    assert world.place("a") is AdapterPlace.NONE
    assert ("a", AdapterPlace.NONE) in [(e.digest, e.place) for e in world.residency.take_events()]


def test_an_adapter_is_not_ready_before_its_copy_is_done(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataplane.memory.residency.MAX_JOINED_BYTES", 0)
    world = make_world(10, num_copy_polls=2)
    world.residency.acquire("x")
    world.settle()
    assert world.residency.prepare("x", may_allocate=True) is Readiness.LOADING
    world.residency.poll_copies()
    assert world.residency.prepare("x", may_allocate=True) is Readiness.LOADING
    assert world.residency.wait_for_copy()
    world.residency.poll_copies()
    assert world.residency.prepare("x", may_allocate=True) is Readiness.READY


def test_a_short_copy_that_a_request_waits_for_is_joined_by_the_next_step(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(20, num_copy_polls=100)
    world.prefetch("ahead")
    for digest in ("xxx", "yyyy"):
        world.residency.acquire(digest)
        world.settle()
        assert world.residency.prepare(digest, may_allocate=True) is Readiness.LOADING
    monkeypatch.setattr("dataplane.memory.residency.MAX_JOINED_BYTES", 4 * len("ahead" + "xxx"))
    world.residency.poll_copies()
    assert world.on_device() == {"xxx"}, "nobody waits for what was there first, and what came last is too far behind"
    world.residency.acquire("ahead")
    world.residency.poll_copies()
    assert world.on_device() == {"ahead", "xxx"}


def test_when_there_is_nothing_else_to_do_the_first_copy_is_waited_for_and_no_other(make_world: MakeWorld) -> None:
    world = make_world(20, num_copy_polls=100)
    world.prefetch("aa", "bb")
    assert world.residency.wait_for_copy()
    world.residency.poll_copies()
    assert world.on_device() == {"aa"}
    world.residency.wait_for_copy()
    world.residency.poll_copies()
    assert world.on_device() == {"aa", "bb"}
    assert not world.residency.wait_for_copy()


def test_what_is_in_host_memory_goes_to_the_device_at_once(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.use("aa", "bbb")
    assert world.place("aa") is AdapterPlace.HOST
    world.residency.acquire("aa")
    assert world.residency.prepare("aa", may_allocate=True) is Readiness.READY, "without a word from another thread"
    assert world.host.num_fetches == 2


def test_nothing_is_read_ahead_while_requests_wait_for_as_many_reads(make_world: MakeWorld) -> None:
    world = make_world(20)
    world.host.answers_at_once = False
    for digest in map(chr, range(97, 97 + MAX_FETCHES_AHEAD)):
        world.residency.acquire(digest)
    world.prefetch("x", "y")
    assert (world.place("x"), world.host.num_fetches) == (AdapterPlace.NONE, MAX_FETCHES_AHEAD)
    world.host.deliver()
    world.settle()
    world.prefetch("x", "y")
    assert (world.place("x"), world.place("y")) == (AdapterPlace.FETCHING, AdapterPlace.FETCHING)


def test_a_copy_that_nobody_waits_for_any_more_can_be_evicted(make_world: MakeWorld) -> None:
    world = make_world(2, num_copy_polls=5)
    world.residency.acquire("aa")
    world.settle()
    world.residency.prepare("aa", may_allocate=True)
    world.residency.release("aa")
    assert world.residency.reclaim(2)
    assert world.pool.num_free == 2
    assert not world.residency.wait_for_copy()


def test_what_is_still_being_copied_is_evicted_after_what_is_there(make_world: MakeWorld) -> None:
    world = make_world(6, num_copy_polls=0)
    world.use("aa")
    world.residency.set_prefetch(["bb"])
    world.residency.advance_prefetch(0)
    world.settle()
    world.use("aa", "aa")
    world.device.num_copy_polls = 5
    world.residency.advance_prefetch(0)
    world.residency.set_prefetch([])
    assert world.residency.reclaim(3)
    assert (world.place("aa"), world.place("bb")) == (AdapterPlace.HOST, AdapterPlace.HOST)
    assert world.residency.num_idle_pages == 2
    assert world.residency.wait_for_copy()
    world.residency.poll_copies()
    assert world.on_device() == {"bb"}


def test_copies_ahead_leave_the_way_free_for_the_first_that_a_request_waits_for(make_world: MakeWorld) -> None:
    world = make_world(40, num_copy_polls=100)
    world.prefetch(*map(chr, range(97, 120)))
    assert world.pool.num_free == 40 - MAX_COPIES_AHEAD
    world.residency.acquire("z")
    world.settle()
    assert world.residency.prepare("z", may_allocate=True) is Readiness.LOADING
    assert world.pool.num_free == 39 - MAX_COPIES_AHEAD


def test_releasing_more_often_than_acquiring_is_a_bug(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.use("a")
    with pytest.raises(AssertionError, match="released more often"):
        world.residency.release("a")
