"""Adapters come by the number through the admin RPC of a running service, each with the rank and weights it should have."""

import asyncio
from pathlib import Path

import grpc
import pytest

from benchmarks.model_shapes import DEMO_MODEL
from benchmarks.null_data_plane import serve as serve_data_plane
from benchmarks.null_engine import NullConfig
from benchmarks.registering import dummy_requests, register_all
from controlplane.app import serve
from controlplane.config import ControlPlaneConfig
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc as pb_grpc


def test_adapters_are_registered_in_bulk_and_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        sockets = f"unix:{tmp_path}/dp", f"unix:{tmp_path}/cp"
        config = ControlPlaneConfig(DEMO_MODEL, sockets[:1], tmp_path / "state", sockets[1:], allow_dummy_adapters=True)
        async with (
            serve_data_plane(sockets[0], NullConfig()),
            serve(config) as service,
            grpc.aio.insecure_channel(sockets[1]) as channel,
        ):
            assert await service.dispatcher.wait_connected(10)
            requests = dummy_requests([8, 4], ["q_proj", "v_proj"], 9, name_template="a/{i}")
            done = await register_all(channel, requests[:7], concurrency=3)
            assert (names := done.names) == [f"a/{i}" for i in range(7)]
            assert len(done.times_s) == 7 and done.size_bytes > 0
            stub = pb_grpc.AdapterServiceStub(channel)
            adapters = (await stub.ListAdapters(pb.ListAdaptersRequest())).adapters
            assert [(each.name, each.current.rank) for each in adapters] == [
                (name, (8, 4)[i % 2]) for i, name in enumerate(names)
            ]
            assert len({each.current.version for each in adapters}) == 7
            # Again, and more of them: those that are there stay as they are.
            again_done = await register_all(channel, requests)
            assert (len(again_done.names), len(again_done.times_s)) == (9, 2)
            again = (await stub.ListAdapters(pb.ListAdaptersRequest())).adapters
            assert (list(again[:7]), len(again)) == (list(adapters), 9)

    asyncio.run(scenario())


def test_the_first_refusal_is_what_the_caller_gets(tmp_path: Path) -> None:
    async def scenario() -> None:
        sockets = f"unix:{tmp_path}/dp", f"unix:{tmp_path}/cp"
        config = ControlPlaneConfig(DEMO_MODEL, sockets[:1], tmp_path / "state", sockets[1:])
        async with (
            serve_data_plane(sockets[0], NullConfig()),
            serve(config) as service,
            grpc.aio.insecure_channel(sockets[1]) as channel,
        ):
            assert await service.dispatcher.wait_connected(10)
            with pytest.raises(grpc.aio.AioRpcError, match="allow-dummy-adapters"):
                await register_all(channel, dummy_requests([8], ["q_proj"], 5))

    asyncio.run(scenario())
