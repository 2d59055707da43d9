"""Watches: what is there, what changes, and going on from a revision."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from controlplane.registry import watch as watch_module
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.planes import AdapterPlace
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import Run, Served, serving, take
from tests.waiting import until


def summary(events: Sequence[pb.WatchAdaptersResponse]) -> list[tuple[str, str]]:
    """Type and name of each."""
    return [(pb.ChangeType.Name(e.type).removeprefix("CHANGE_TYPE_"), e.adapter.name) for e in events]


def test_a_watch_tells_what_is_there_then_what_changes(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1)
        await s.register("b", 2)
        call = s.stub.WatchAdapters(pb.WatchAdaptersRequest())
        known = await take(call, 2)
        assert summary(known) == [("ADDED", "a"), ("ADDED", "b")]
        # Only the last of what is known can be gone on from: a client that stops before it must begin anew.
        assert [bool(e.revision) for e in known] == [False, True]
        digest = (await s.update("a", ["labels"], labels={"k": "v"})).current.version
        await s.unregister("b")
        events = await take(call, 2)
        assert summary(events) == [("MODIFIED", "a"), ("DELETED", "b")]
        assert events[0].adapter.labels == {"k": "v"}
        s.control.move(digest, AdapterPlace.DEVICE)
        moved = (await take(call, 1))[0]
        assert summary([moved]) == [("MODIFIED", "a")] and moved.adapter.state == pb.ADAPTER_STATE_READY
        assert moved.revision == events[-1].revision
        call.cancel()

    run(scenario)


def test_a_watch_goes_on_from_any_kept_revision_without_loss(run: Run) -> None:
    async def scenario(s: Served) -> None:
        start = (await s.list()).revision
        for n in range(4):
            await s.register(f"a{n}", n)
        call = s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=start))
        events = await take(call, 4)
        assert summary(events) == [("ADDED", f"a{n}") for n in range(4)]
        call.cancel()
        for event, rest in zip(events, (3, 2, 1, 0), strict=True):
            call = s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=event.revision))
            assert summary(await take(call, rest)) == summary(events[4 - rest :])
            call.cancel()

    run(scenario)


def test_history_beyond_memory_is_read_from_redis(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            start = (await s.list()).revision
            await s.register("a", 1)
            await s.update("a", ["labels"], labels={"k": "v"})
        async with serving(tmp_path) as s:  # a new process: nothing in memory
            call = s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=start))
            assert summary(await take(call, 2)) == [("ADDED", "a"), ("MODIFIED", "a")]
            await s.unregister("a")
            assert summary(await take(call, 1)) == [("DELETED", "a")]
            call.cancel()

    asyncio.run(scenario())


def test_revisions_that_cannot_be_gone_on_from_are_out_of_range(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(s: Served) -> None:
        start = (await s.list()).revision
        here = start.partition("-")[0]
        s.registry.redis._history = 2
        for n in range(4):
            await s.register(f"a{n}", n)
        s.registry.directory._changes.clear()
        for revision in (start, f"{here}-99", "0-4"):
            with Refused(Code.OUT_OF_RANGE, "list again") as refusal:
                await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=revision)), 1)
            assert refusal.reason == "REVISION_GONE"
        with Refused(Code.INVALID_ARGUMENT, "is not a revision"):
            await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision="soon")), 1)
        monkeypatch.setattr(watch_module, "MAX_WATCHES", 0)
        with Refused(Code.RESOURCE_EXHAUSTED, "at most 0"):
            await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest()), 1)

    run(scenario)


def test_a_watch_that_ends_is_forgotten(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1)
        for _ in range(3):
            call = s.stub.WatchAdapters(pb.WatchAdaptersRequest())
            await take(call, 1)
            call.cancel()
        await until(lambda: not s.service._watches._watches)

    run(scenario)
