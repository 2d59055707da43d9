"""Requests and their adapters: waiting for one, failing with one, and room for those in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.planes import AdapterPlace, EngineFinishReason

if TYPE_CHECKING:
    from tests.dataplane.conftest import Admit, Expect, MakeWorld


def test_an_adapter_on_its_way_delays_only_its_own_requests(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world()
    world.host.answers_at_once = False
    world.update(admit=[admit(1, [1, 2], 3, "slow"), admit(2, [1, 2], 3)])
    world.run_until_idle()
    assert world.tokens == {2: expect([1, 2], 3)}
    world.clock.now = 2.5
    world.host.deliver()
    reports = world.run_until_idle()
    assert world.tokens[1] == expect([1, 2], 3, "slow", 3)
    ready = [r for report in reports for r in report.adapter_ready]
    assert [(r.request_key, r.wait_s) for r in ready] == [(1, 2.5)]


def test_who_finds_the_adapter_on_the_device_has_waited_for_nothing(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1, 2], 3, "x")])
    world.run_until_idle()
    world.sink.capacity = len(world.sink.reports)
    world.update(admit=[admit(2, [1, 2], 3, "x")])
    world.turn()
    world.clock.now = 2.5
    world.sink.capacity = 10_000
    reports = world.run_until_idle()
    assert [(r.request_key, r.wait_s) for report in reports for r in report.adapter_ready] == [(2, 0.0)]


def test_copies_that_take_time_are_joined_before_use(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world(num_copy_polls=3)
    world.update(admit=[admit(1, [1, 2], 3, "x"), admit(2, [4], 8), admit(3, [1], 3, "y")])
    world.run_until_idle()
    assert world.tokens == {1: expect([1, 2], 3, "x", 3), 2: expect([4], 8), 3: expect([1], 3, "y", 3)}


def test_a_failed_load_ends_its_requests_and_the_next_admission_tries_again(
    make_world: MakeWorld, admit: Admit, expect: Expect
) -> None:
    world = make_world()
    world.host.errors["bad"] = "image is truncated"
    world.update(admit=[admit(1, [1], 3, "bad"), admit(2, [1], 3, "bad"), admit(3, [1], 3)])
    reports = world.run_until_idle()
    assert world.finished[1] == world.finished[2] == (EngineFinishReason.ADAPTER_FAILED, "image is truncated")
    assert world.tokens == {3: expect([1], 3)}
    events = [e for report in reports for e in report.adapter_events]
    assert [(e.digest, e.place, e.error) for e in events][-1] == ("bad", AdapterPlace.FAILED, "image is truncated")
    world.host.errors.clear()
    world.update(admit=[admit(4, [1], 3, "bad")])
    world.run_until_idle()
    assert world.tokens[4] == expect([1], 3, "bad", 3)


def test_an_adapter_larger_than_the_pool_fails_with_the_numbers(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world(num_pages=8, image_pages=lambda digest: 9)
    world.update(admit=[admit(1, [1], 3, "huge")])
    world.run_until_idle()
    assert world.finished[1] == (EngineFinishReason.ADAPTER_FAILED, "adapter huge takes 9 pages; the whole pool has 8")


def test_kv_pushes_out_idle_adapters_and_not_those_in_use(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world(num_pages=10)
    world.update(admit=[admit(1, [1], 2, "old")])
    world.run_until_idle()
    world.update(admit=[admit(2, [1], 20, "used"), admit(3, [2] * 4, 4)])
    world.run_until_idle()
    assert world.tokens[2] == expect([1], 20, "used", 3)
    assert world.tokens[3] == expect([2] * 4, 4)
    assert {e.digest for e in world.residency.snapshot() if e.place is AdapterPlace.DEVICE} == {"used"}
