"""What data planes are told (pins, offers, preloads), and how what they say is shown."""

import asyncio
from dataclasses import replace
from pathlib import Path

from google.rpc import error_details_pb2

from protos.loraplane.v1 import adapter_pb2 as pb
from protos.planes import AdapterPlace
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import GEOMETRY, FakeControl, Run, Served, serving


def test_pins_are_told_to_the_data_planes_and_leave_half_of_the_pool(run: Run) -> None:
    async def scenario(s: Served) -> None:
        a = await s.register("a", 1, pinned=True)
        pages = a.current.num_pages
        assert a.pinned and s.control.pinned == [a.current.version]
        s.control.num_pages = pages * 4
        b = await s.register("b", 2)
        assert (await s.stub.PinAdapter(pb.PinAdapterRequest(name="b"))).adapter.pinned
        assert s.control.pinned == [a.current.version, b.current.version]
        await s.register("c", 3)
        with Refused(Code.RESOURCE_EXHAUSTED, f"at most {pages * 2} of {pages * 4} may be pinned") as refusal:
            await s.stub.PinAdapter(pb.PinAdapterRequest(name="c"))
        assert refusal.detail(error_details_pb2.QuotaFailure).violations[0].subject == "pinned_pages"
        with Refused(Code.RESOURCE_EXHAUSTED):
            await s.register("d", 4, pinned=True)
        # Weights that are pinned already take no second share.
        await s.register("e", 1, pinned=True)
        await s.stub.UnpinAdapter(pb.UnpinAdapterRequest(name="b"))
        assert s.control.pinned == [a.current.version]
        newer = await s.update("a", ["source"], seed=5)
        await s.unregister("e")
        assert s.control.pinned == [newer.current.version]
        await s.unregister("a")
        assert s.control.pinned == []
        for call, request in ((s.stub.PinAdapter, pb.PinAdapterRequest), (s.stub.UnpinAdapter, pb.UnpinAdapterRequest)):
            with Refused(Code.NOT_FOUND):
                await call(request(name="a"))

    run(scenario)


def test_pins_are_told_again_when_a_data_plane_connects_as_far_as_they_fit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            first = await s.register("a", 1, pinned=True)
            await s.register("b", 2, pinned=True)
        async with serving(tmp_path, control=FakeControl(num_pages=0)) as s:
            assert s.control.pinned == []
            s.control.num_pages = 2 * first.current.num_pages
            for callback in s.control.connection_callbacks:
                callback(True)
            assert s.control.pinned == [first.current.version]

    asyncio.run(scenario())


def test_data_planes_are_offered_what_the_names_serve_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            first, other = await s.register("a", 1), await s.register("b", 2)
            assert s.control.offered == {each.current.version: each.current.num_pages for each in (first, other)}
            second = await s.update("a", ["source"], seed=3)
            assert set(s.control.offered) == {second.current.version, other.current.version}
            # The weights of a's first version are served again, under another name.
            third = await s.register("c", 1)
            assert set(s.control.offered) == {second.current.version, other.current.version, third.current.version}
            await s.unregister("b")
            assert set(s.control.offered) == {second.current.version, third.current.version}
        async with serving(tmp_path) as s:
            assert set(s.control.offered) == {second.current.version, third.current.version}
        # Until a data plane connects it is not known whether it has the base that they were made for.
        async with serving(tmp_path, control=FakeControl(base=None)) as s:
            s.control.base = replace(GEOMETRY, fingerprint="e" * 64)
            for callback in s.control.connection_callbacks:
                callback(True)
            assert s.control.offered == {}

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_preload_asks_the_data_planes_and_get_shows_where_the_weights_are(run: Run) -> None:
    async def scenario(s: Served) -> None:
        digest = (await s.register("a", 1, aliases=["b"])).current.version
        await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name=f"b@{digest[:8]}"))
        assert s.control.preloaded == [digest]
        states = {
            AdapterPlace.FETCHING: (pb.ADAPTER_STATE_FETCHING, []),
            AdapterPlace.HOST: (pb.ADAPTER_STATE_REGISTERED, [pb.MEMORY_TIER_HOST]),
            AdapterPlace.DEVICE: (pb.ADAPTER_STATE_READY, [pb.MEMORY_TIER_DEVICE]),
            AdapterPlace.FAILED: (pb.ADAPTER_STATE_FAILED, []),
        }
        for place, (state, tiers) in states.items():
            s.control.move(digest, place)
            adapter = await s.get("a")
            assert adapter.state == state
            assert [r.tier for r in adapter.residency] == tiers
        assert "plane:1" in adapter.error
        s.control.move(digest, AdapterPlace.DEVICE)
        residency = (await s.get("a")).residency[0]
        assert (residency.data_plane, residency.size_bytes) == ("plane:1", 4096)
        assert residency.last_used.ToMilliseconds() == 1_700_000_000_500
        with Refused(Code.NOT_FOUND):
            await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name="c"))
        s.control.base = None
        with Refused(Code.UNAVAILABLE):
            await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name="a"))

    run(scenario)
