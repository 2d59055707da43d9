"""Clients that leave, run out of time, stop reading or come back: their pages come free and nobody else notices."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dataplane.runner.model_runner import TorchModelRunner
from protos.loraplane.v1 import adapter_pb2, data_plane_pb2, data_plane_pb2_grpc
from tests.waiting import until

if TYPE_CHECKING:
    from tests.e2e.conftest import Service, TinyModel

PROMPT = (5, 6, 7, 8)
LONG = {"max_tokens": 480, "ignore_eos": True}


def _num_steps(service: "Service") -> int:
    return service.control_plane.dispatcher.load().data_planes[0].num_steps


def _kv_pages(service: "Service") -> int:
    return service.control_plane.dispatcher.load().data_planes[0].pool.kv_pages


async def _leave_by_cancel(service: "Service") -> None:
    call = service.inference.Generate(service.request("", PROMPT, **LONG), timeout=60)
    async for _ in call:
        if _kv_pages(service) >= 2:
            break
    call.cancel()


async def _leave_by_deadline(service: "Service") -> None:
    call = service.inference.Generate(service.request("", PROMPT, **LONG), timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("leave", [_leave_by_cancel, _leave_by_deadline])
def test_a_client_that_leaves_frees_its_pages_within_two_steps(
    leave: "Callable[[Service], Awaitable[None]]", build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))

    async def scenario(service: "Service") -> None:
        # Somebody else keeps the engine stepping, so that steps can be counted.
        stays = asyncio.create_task(service.generate("", (9,), max_tokens=30, ignore_eos=True))
        await until(lambda: _kv_pages(service) >= 1)
        await leave(service)
        dispatcher = service.control_plane.dispatcher
        await until(lambda: dispatcher.load().num_running == 1)
        num_steps = _num_steps(service)
        await until(lambda: _num_steps(service) >= num_steps + 2)
        assert _kv_pages(service) <= -(-(1 + _num_steps(service)) // 16), "pages of the client that left are still held"
        assert len((await stays).token_ids) == 30

    run_service(model, scenario, extra_step_s=0.05)


def test_a_reader_that_stops_reading_harms_nobody_and_loses_nothing(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))

    async def scenario(service: "Service") -> None:
        request = service.request("", PROMPT, n=8, **LONG)
        stalled = service.inference.Generate(request, timeout=60)
        events = aiter(stalled)
        assert (await anext(events)).WhichOneof("event") == "started"
        others = [service.generate("", (9, number), max_tokens=60, ignore_eos=True) for number in range(8)]
        answers = await asyncio.gather(*others)
        assert all(len(answer.token_ids) == 60 for answer in answers)
        num_tokens = 0
        async for response in events:
            num_tokens += len(response.chunk.token_ids)
        assert num_tokens == 8 * LONG["max_tokens"]

    run_service(model, scenario)


def test_a_request_whose_adapter_cannot_be_loaded_fails_alone(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))

    async def scenario(service: "Service") -> None:
        good, bad = (await service.register_all())[:2]
        image = next(service.store_dir.glob(f"*{bad.current.version}*"))
        damaged = bytearray(image.read_bytes())
        damaged[-1] ^= 1
        image.write_bytes(damaged)
        healthy = [service.generate(name, PROMPT, max_tokens=30) for name in ("", good.name)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.generate(bad.name, PROMPT, max_tokens=30)
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        shown = (await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=bad.name))).adapter
        assert shown.state == adapter_pb2.ADAPTER_STATE_FAILED
        assert "content has digest" in shown.error, "it must say what is wrong with the weights"
        assert all(answer.token_ids for answer in await asyncio.gather(*healthy))

    run_service(model, scenario, control_plane={"idle_prefetch": False})


def test_streams_go_on_through_a_data_plane_that_restarts(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))

    async def scenario(service: "Service") -> None:
        await service.register_all()
        requests = [
            ((adapter, (5, 6, number)), {"max_tokens": 200, "ignore_eos": True, "temperature": 1.0, "seed": number})
            for number, adapter in enumerate(("", *model.adapters))
        ]
        undisturbed = await service.generate_each(requests)
        running = asyncio.create_task(service.generate_each(requests))
        await until(lambda: _kv_pages(service) >= 10)
        await service.data_planes[0].stop()
        assert not running.done(), "the data plane went too late to disturb anybody"
        await service.data_planes[0].start()
        disturbed = await running
        assert [answer.token_ids for answer in disturbed] == [answer.token_ids for answer in undisturbed]

    run_service(model, scenario, extra_step_s=0.005)


def test_a_step_that_takes_long_holds_up_no_other_call(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", (2, 8, 12, 16))
    is_in_step, may_go_on = threading.Event(), threading.Event()
    launch = TorchModelRunner.launch

    def launch_slowly(runner: TorchModelRunner, chunks: Any) -> Any:
        is_in_step.set()
        assert may_go_on.wait(60)
        return launch(runner, chunks)

    monkeypatch.setattr(TorchModelRunner, "launch", launch_slowly)

    async def scenario(service: "Service") -> None:
        running = asyncio.create_task(service.generate("", PROMPT, max_tokens=20, ignore_eos=True))
        assert await asyncio.to_thread(is_in_step.wait, 60)
        (address,) = (plane.address for plane in service.control_plane.dispatcher.load().data_planes)
        async with grpc.aio.insecure_channel(address) as channel:
            data_plane = data_plane_pb2_grpc.DataPlaneServiceStub(channel)
            assert (await data_plane.Describe(data_plane_pb2.DescribeRequest(), timeout=30)).pool.num_pages == 256
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=30)
            listed = {entry.name for entry in (await call.read()).list_services_response.service}
            assert {"loraplane.v1.DataPlaneService", "grpc.health.v1.Health"} <= listed
            call.cancel()
        # Adapters are registered meanwhile, and what cannot be served is refused.
        await service.register_all()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.generate("nobody", PROMPT, max_tokens=1)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert not running.done()
        may_go_on.set()
        assert len((await running).token_ids) == 20

    run_service(model, scenario)
