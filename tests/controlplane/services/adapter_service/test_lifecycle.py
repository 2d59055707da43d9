"""The registry outlives Redis and its control planes, and several of these share it."""

import asyncio
import os
import signal
from pathlib import Path

import grpc
from google.rpc import error_details_pb2

from adapter_store.geometry import BaseGeometry
from controlplane.registry.embedded_redis import EmbeddedRedis
from protos.loraplane.v1 import adapter_pb2 as pb
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import GEOMETRY, FakeControl, serving
from tests.waiting import until


def test_while_redis_is_away_reads_go_on_and_writes_are_unavailable(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path / "redis") as redis, serving(tmp_path, redis.url) as s:
            adapter = await s.register("a", 1)
            os.kill(redis.pid, signal.SIGKILL)
            assert await s.get("a") == adapter
            assert list((await s.list()).adapters) == [adapter]
            s.registry.directory.resolve("a").release()
            with Refused(Code.UNAVAILABLE, "registry is away") as refusal:
                await s.register("b", 2)
            assert refusal.reason == "REGISTRY_AWAY"
            assert refusal.detail(error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 1
            while True:  # the private Redis is started again by itself
                try:
                    await s.register("b", 2)
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is Code.UNAVAILABLE
                    await asyncio.sleep(0.05)
            assert s.registry.directory.resolve("b").ref.name == "b"
            assert len(s.store.digests()) == 2

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_two_control_planes_share_one_registry(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path / "redis") as redis:
            url = redis.url
            async with serving(tmp_path, url) as one, serving(tmp_path, url) as two:
                adapter = await one.register("a", 1)
                await until(lambda: two.registry.directory.get("a") is not None)
                assert await two.get("a") == adapter
                lease = two.registry.directory.resolve("a")
                await one.unregister("a", force=True)
                await until(lambda: two.control.aborted == [adapter.current.version])
                assert one.control.aborted == [adapter.current.version]
                await one.registry.images.collect()
                assert one.store.digests() == (adapter.current.version,)  # the other still uses it
                lease.release()
                await until(lambda: one.store.digests() == ())

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_adapters_outlive_a_restart_and_a_base_they_were_not_made_for_refuses_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            adapter = await s.register("a", 1, labels={"k": "v"}, aliases=["b"])
        async with serving(tmp_path) as s:
            assert await s.get("b") == adapter
        other = BaseGeometry("other", "e" * 64, "float32", 2, 1, 8, GEOMETRY.modules, max_lora_rank=8)
        async with serving(tmp_path, control=FakeControl(base=other)) as s:
            shown = await s.get("a")
            assert shown.state == pb.ADAPTER_STATE_FAILED and "was packed for base" in shown.error
            with Refused(Code.FAILED_PRECONDITION, "was packed for base") as refusal:
                await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name="a"))
            [violation] = refusal.detail(error_details_pb2.PreconditionFailure).violations
            assert (violation.type, violation.subject) == ("ADAPTER_FAILED", "a")
            mended = await s.update("a", ["source"], seed=1)
            assert mended.state == pb.ADAPTER_STATE_REGISTERED and mended.current.version != adapter.current.version

    asyncio.run(asyncio.wait_for(scenario(), 60))
