"""A name goes at once, its weights after the last request."""

import asyncio

import pytest
from google.protobuf import duration_pb2

from controlplane.errors import NotFoundError
from protos.loraplane.v1 import adapter_pb2 as pb
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import Run, Served
from tests.waiting import until


def test_unregister_takes_the_name_at_once_and_the_weights_after_the_last_request(run: Run) -> None:
    async def scenario(s: Served) -> None:
        adapter = await s.register("a", 1, aliases=["b"])
        lease = s.registry.directory.resolve("a")
        gone = await s.unregister("a")
        assert gone.state == pb.ADAPTER_STATE_DRAINING and gone.name == "a"
        for name in ("a", "b"):
            with Refused(Code.NOT_FOUND):
                await s.get(name)
            with pytest.raises(NotFoundError):
                s.registry.directory.resolve(name)
        assert s.store.digests() == (adapter.current.version,)
        lease.release()
        await until(lambda: s.store.digests() == ())
        assert s.control.aborted == []
        with Refused(Code.NOT_FOUND):
            await s.unregister("a")

    run(scenario)


def test_unregister_waits_for_the_drain_as_long_as_asked(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1)
        await s.register("b", 2)
        held, freed = s.registry.directory.resolve("a"), s.registry.directory.resolve("b")
        short, long = duration_pb2.Duration(nanos=1_000_000), duration_pb2.Duration(seconds=50)
        assert (await s.unregister("a", drain_timeout=short)).state == pb.ADAPTER_STATE_DRAINING
        waiting = asyncio.ensure_future(s.unregister("b", drain_timeout=long))
        await until(lambda: s.registry.directory.get("b") is None)
        freed.release()
        assert (await waiting).state == pb.ADAPTER_STATE_REGISTERED
        held.release()
        with Refused(Code.INVALID_ARGUMENT, "drain_timeout: -1 s must be from 0 to 3600 s"):
            await s.unregister("a", drain_timeout=duration_pb2.Duration(seconds=-1))

    run(scenario)


def test_force_aborts_the_requests_unless_another_name_has_the_weights(run: Run) -> None:
    async def scenario(s: Served) -> None:
        digest = (await s.register("a", 1)).current.version
        await s.register("b", 1)
        await s.unregister("a", force=True)
        assert s.control.aborted == []
        await s.unregister("b", force=True)
        assert s.control.aborted == [digest]

    run(scenario)


def test_a_name_is_free_again_while_its_old_weights_drain(run: Run) -> None:
    async def scenario(s: Served) -> None:
        old = (await s.register("a", 1)).current.version
        lease = s.registry.directory.resolve("a")
        await s.unregister("a")
        new = (await s.register("a", 2)).current.version
        assert lease.version.digest == old and s.registry.directory.resolve("a").version.digest == new
        assert s.store.digests() == tuple(sorted((old, new)))
        # The same weights again, while they are about to go.
        await s.register("c", 1)
        lease.release()
        await s.registry.images.collect()
        assert s.store.digests() == tuple(sorted((old, new)))

    run(scenario)
