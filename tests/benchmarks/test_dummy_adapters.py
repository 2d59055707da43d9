"""Dummy adapters come by the number through the admin RPC of a running service, each with the rank and weights it should have."""

import asyncio
from pathlib import Path

import grpc

from benchmarks.dummy_adapters import MODEL, geometry_of, register_dummy_adapters
from benchmarks.model_shapes import LLAMA_3_8B, LLAMA_7B
from benchmarks.null_data_plane import serve as serve_data_plane
from benchmarks.null_engine import NullConfig
from controlplane.app import serve
from controlplane.config import ControlPlaneConfig
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc as pb_grpc


def test_adapters_are_registered_in_bulk_and_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        sockets = f"unix:{tmp_path}/dp", f"unix:{tmp_path}/cp"
        config = ControlPlaneConfig(MODEL, sockets[:1], tmp_path / "state", sockets[1:], allow_dummy_adapters=True)
        async with (
            serve_data_plane(sockets[0], NullConfig()),
            serve(config) as service,
            grpc.aio.insecure_channel(sockets[1]) as channel,
        ):
            assert await service.dispatcher.wait_connected(10)
            names = await register_dummy_adapters(channel, [8, 4], ["q_proj", "v_proj"], 7, concurrency=3, name_template="a/{i}")
            assert names == [f"a/{i}" for i in range(7)]
            stub = pb_grpc.AdapterServiceStub(channel)
            adapters = (await stub.ListAdapters(pb.ListAdaptersRequest())).adapters
            assert [(each.name, each.current.rank) for each in adapters] == [
                (name, (8, 4)[i % 2]) for i, name in enumerate(names)
            ]
            assert len({each.current.version for each in adapters}) == 7
            # Again, and more of them: those that are there stay as they are.
            assert len(await register_dummy_adapters(channel, [8, 4], ["q_proj", "v_proj"], 9, name_template="a/{i}")) == 9
            again = (await stub.ListAdapters(pb.ListAdaptersRequest())).adapters
            assert (list(again[:7]), len(again)) == (list(adapters), 9)

    asyncio.run(scenario())


def test_sizes_are_those_of_the_paper_s_adapters() -> None:
    base = geometry_of(LLAMA_7B)
    assert (base.page_tokens, base.page_bytes) == (16, 8 << 20)
    # Grouped queries: K and V of a token are a quarter as long, so more tokens share a page in which the longest row fits.
    assert geometry_of(LLAMA_3_8B).page_elems >= LLAMA_3_8B.intermediate_size
