"""The data plane over gRPC on a Unix socket, with real parts throughout: a small Llama, PEFT adapters, store, pages, engine."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dataplane.assembly import load_data_plane
from dataplane.config import LoadFormat
from dataplane.service.server import SERVICE_NAME, DataPlaneServer, ListenError
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import (
    AdapterPlace,
    EngineFinishReason,
    StepReport,
)
from tests.dataplane.service.served import TIMEOUT_S, VOCAB, Control, Served, admitted, reason_of, serving


def test_describe_tells_model_geometry_and_limits(served: Served) -> None:
    async def run() -> pb.DescribeResponse:
        async with serving(served.config) as channel:
            return await pb_grpc.DataPlaneServiceStub(channel).Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)

    described = asyncio.run(run())
    assert (described.model.name, described.model.architecture) == ("tiny-llama", "LlamaForCausalLM")
    assert (described.model.vocab_size, list(described.model.eos_token_ids)) == (VOCAB, [2])
    assert (described.pool.num_pages, described.pool.page_tokens, described.pool.page_elems) == (24, 16, 1024)
    assert (described.max_num_seqs, described.token_budget, described.max_model_len) == (8, 16, 256)
    assert next(m.name for m in described.model.modules) == "q_proj"
    assert described.epoch != 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_mixed_batch_answers_as_transformers_and_peft_do(served: Served, device: str) -> None:
    """Base and adapters of different ranks and modules together, in chunks of a small budget, through a small pool."""
    # On a GPU the pool is sized from what is free, so that the run that measures it is tested too.
    config = served.config if device == "cpu" else replace(served.config, device=device, num_pages=None)
    prompts = {"": [5, 9, 17], "attention": list(range(3, 40)), "all": [7, 7, 30], "mixed": list(range(90, 70, -1))}

    async def run() -> tuple[dict[int, list[int]], Control]:
        async with serving(config) as channel:
            control = await Control.open(channel)
            admits = [admitted(i, p, 24, served.digests.get(name, "")) for i, (name, p) in enumerate(prompts.items())]
            await control.update(admit=tuple(admits))
            return await control.read_until_finished(len(prompts)), control

    tokens, control = asyncio.run(run())
    assert tokens == {i: served.expected(name, prompt, 24) for i, (name, prompt) in enumerate(prompts.items())}
    on_device = {e.digest for r in control.reports for e in r.adapter_events if e.place is AdapterPlace.DEVICE}
    assert on_device == set(served.digests.values())
    assert control.reports[-1].pool.kv_pages == 0
    assert max(r.timing.num_prefill_tokens + r.timing.num_decode_tokens for r in control.reports) == 16


def test_seeded_sampling_gives_the_same_alone_and_in_company(served: Served) -> None:
    request = admitted(1, [4, 5, 6], 20, served.digests["all"], temperature=0.9, top_p=0.95, seed=77, num_logprobs=2)

    async def run() -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        async with serving(served.config) as channel:
            control = await Control.open(channel)
            await control.update(admit=(request,))
            alone = await control.read_until_finished(1)
            assert all(len(r.logprobs[1].top_token_ids) == 2 for r in control.reports if r.request_keys)
            crowd = [admitted(key, [key, 8], 30, served.digests["mixed"], temperature=1.0, seed=key) for key in range(2, 6)]
            await control.update(admit=(*crowd, replace(request, request_key=9)))
            return alone, await control.read_until_finished(5)

    alone, together = asyncio.run(run())
    assert together[9] == alone[1]
    assert len({tuple(tokens) for tokens in together.values()}) == 5


def test_an_unknown_adapter_ends_its_request_and_nothing_else(served: Served) -> None:
    async def run() -> StepReport:
        async with serving(served.config) as channel:
            control = await Control.open(channel)
            await control.update(admit=(admitted(1, [3], 5, "0" * 64), admitted(2, [3], 5)))
            await control.read_until_finished(2)
            return next(r for r in control.reports if any(f.request_key == 1 for f in r.finished))

    report = asyncio.run(run())
    (finished,) = [f for f in report.finished if f.request_key == 1]
    assert finished.reason is EngineFinishReason.ADAPTER_FAILED
    assert "0000" in finished.error


def test_a_stop_ends_the_stream_with_unavailable(served: Served) -> None:
    async def run() -> grpc.aio.AioRpcError:
        data_plane = load_data_plane(served.config)
        server = DataPlaneServer(data_plane, served.config.listen, 10.0)
        (address,) = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE_NAME):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            control = await Control.open(channel)
            await control.update(admit=(admitted(1, [3], 250),))
            await server.stop()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                while await control.call.read() is not grpc.aio.EOF:
                    pass
            return raised.value

    error = asyncio.run(run())
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


def test_an_engine_that_fails_is_not_serving(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[grpc.aio.AioRpcError, Any]:
        data_plane = load_data_plane(served.config)
        server = DataPlaneServer(data_plane, served.config.listen, 10.0)

        def fail(chunks: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(data_plane.engine._runner, "launch", fail)
        (address,) = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            control = await Control.open(channel)
            await control.update(admit=(admitted(1, [3], 5),))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await control.read()
            await server.wait_for_failure()
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=TIMEOUT_S)
            await server.stop()
            return raised.value, answer.status

    error, status = asyncio.run(run())
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")
    assert "device is gone" not in (error.details() or ""), "traces stay in the log"
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_an_address_that_is_taken_is_named(served: Served) -> None:
    async def run() -> None:
        data_plane = load_data_plane(served.config)
        first = DataPlaneServer(data_plane, ("127.0.0.1:0",), 1.0)
        (address,) = await first.start()
        assert not address.endswith(":0")
        with pytest.raises(ListenError, match=address):
            await DataPlaneServer(data_plane, (address,), 1.0).start()
        await first.stop()

    asyncio.run(run())


def test_random_weights_serve_too(served: Served) -> None:
    async def run() -> dict[int, list[int]]:
        async with serving(replace(served.config, load_format=LoadFormat.DUMMY)) as channel:
            control = await Control.open(channel)
            await control.update(admit=(admitted(1, [3], 5),))
            return await control.read_until_finished(1)

    assert len(asyncio.run(run())[1]) == 5
