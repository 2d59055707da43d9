"""Adapters that nobody asked for come to the device early: in order, into pages to spare, and never before those that wait."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.null_engine import NullConfig
from controlplane.messages import AdapterRef, RequestSpec
from controlplane.scheduling.idle_prefetch import MAX_AT_ONCE, IdlePrefetch
from protos.planes import AdapterEvent, AdapterPlace

if TYPE_CHECKING:
    from tests.controlplane.scheduling.conftest import Harness

MakeSpec = Callable[..., RequestSpec]
MakeAdapter = Callable[..., AdapterRef]
MakeHarness = Callable[..., "Harness"]


def offer(world: "Harness", adapter: MakeAdapter, count: int) -> list[str]:
    """Offers adapters of two pages."""
    digests = [adapter(n).digest for n in range(count)]
    for digest in digests:
        world.scheduler.offer(digest, 2)
    world.schedule()
    return digests


def settle(world: "Harness") -> None:
    while world.turn():
        pass


def test_a_quarter_of_the_pool_stays_free() -> None:
    prefetch = IdlePrefetch(100)
    for n in range(5):
        prefetch.add(f"{n}", 10)
    assert prefetch.next(free_pages=100) == ("0", "1", "2")
    assert prefetch.next(free_pages=46) == ("0", "1")
    assert prefetch.next(free_pages=35) == ("0",)
    assert prefetch.next(free_pages=34) == ()


def test_an_adapter_is_named_until_it_has_arrived_or_cannot_come() -> None:
    prefetch = IdlePrefetch(100)
    for n in range(6):
        prefetch.add(f"{n}", 1)
    for place in (AdapterPlace.FETCHING, AdapterPlace.HOST):
        prefetch.settle(AdapterEvent("0", place))
    assert prefetch.next(100) == ("0", "1", "2")
    for n, place in enumerate((AdapterPlace.DEVICE, AdapterPlace.FAILED, AdapterPlace.NONE)):
        prefetch.settle(AdapterEvent(f"{n}", place))
    assert prefetch.next(100) == ("3", "4", "5")


def test_offered_adapters_come_to_an_idle_device_a_few_at_a_time_until_its_spare_pages_are_full(
    adapter: MakeAdapter, harness: MakeHarness
) -> None:
    world = harness([NullConfig(num_pages=40)])
    digests = offer(world, adapter, 20)
    engine = world.wires["dp0"].engine
    while world.turn():
        assert len(engine.prefetch) <= MAX_AT_ONCE
    assert list(engine.on_device) == digests[:15]
    assert engine.prefetch == ()


def test_a_request_finds_an_offered_adapter_on_the_device(spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness) -> None:
    world = harness([NullConfig(adapter_steps=5)])
    offer(world, adapter, 3)
    settle(world)
    request = world.submit(spec(adapter=adapter(1)))
    world.run()
    assert request.adapter_wait_s == 0


def test_while_a_request_waits_nothing_is_brought_in_for_nobody(
    spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness
) -> None:
    world = harness([NullConfig(max_num_seqs=1)])
    running, _ = (world.submit(spec(max_tokens=n, adapter=adapter(n), seed=n)) for n in (30, 31))
    offer(world, adapter, 5)
    while running not in world.ended:
        assert set(world.wires["dp0"].engine.prefetch) <= {adapter(31).digest}
        world.turn()
    world.run()
    settle(world)
    assert {adapter(n).digest for n in range(5)} <= world.wires["dp0"].engine.on_device.keys()


def test_what_was_evicted_does_not_come_back_by_itself_but_a_new_session_brings_it(
    spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness
) -> None:
    world = harness([NullConfig(num_pages=40)])
    offer(world, adapter, 4)
    settle(world)
    world.submit(spec(prompt_tokens=16 * 38, max_tokens=8))
    world.run()
    assert not world.wires["dp0"].engine.on_device
    settle(world)
    assert not world.wires["dp0"].engine.on_device
    world.lose(0)
    world.connect(0)
    settle(world)
    assert len(world.wires["dp0"].engine.on_device) == 4


def test_what_is_taken_back_is_not_brought_in(adapter: MakeAdapter, harness: MakeHarness) -> None:
    world = harness([NullConfig()])
    first, second, third, *_ = digests = offer(world, adapter, 8)
    world.scheduler.withdraw(third)
    world.scheduler.withdraw(digests[-1])
    settle(world)
    assert set(world.wires["dp0"].engine.on_device) == {first, second, *digests[3:-1]}
