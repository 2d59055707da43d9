"""SystemService and health of a whole control plane: before it serves, while it does, and as it drains."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.app import serve
from controlplane.config import ControlPlaneConfig
from controlplane.services.server import SERVICE_NAMES
from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import inference_pb2_grpc, system_pb2, system_pb2_grpc
from tests.controlplane.app.served import NULL, TIMEOUT_S, VOCAB_SIZE, Client, refused, sampling
from tests.waiting import until


def test_without_a_data_plane_requests_are_unavailable_and_the_system_answers(tmp_path: Path, model_dir: Path) -> None:
    async def scenario() -> None:
        config = ControlPlaneConfig(model_dir, (f"unix:{tmp_path}/nobody.sock",), tmp_path / "state", ("127.0.0.1:0",))
        async with serve(config) as app, grpc.aio.insecure_channel(app.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            code, _, details = await refused(stub.Generate(pb.GenerateRequest(text="x"), timeout=TIMEOUT_S).read())
            assert code is grpc.StatusCode.UNAVAILABLE
            assert details["ErrorInfo"].reason == "NO_DATA_PLANE"
            assert details["RetryInfo"].retry_delay.ToNanoseconds() > 0
            info = await system_pb2_grpc.SystemServiceStub(channel).GetServerInfo(system_pb2.GetServerInfoRequest())
            assert (info.base_model, len(info.data_planes), info.limits.max_waiting) == ("", 0, 1024)
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING

    asyncio.run(scenario())


def test_health_tells_every_service_and_every_watcher(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICE_NAMES):
            assert (await client.health.Check(health_pb2.HealthCheckRequest(service=name))).status == serving
        code, _, _ = await refused(client.health.Check(health_pb2.HealthCheckRequest(service="other.Service")))
        assert code is grpc.StatusCode.NOT_FOUND
        watches = [client.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == serving
        watches.pop().cancel()
        await client.app.drain(1.0)
        for watch in watches:
            assert (await watch.read()).status == not_serving
            watch.cancel()

    play(scenario)


def test_drain_finishes_what_runs_and_refuses_what_is_new(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        running_call = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=30, seed=0)))
        await until(lambda: bool(client.null.engine.standing))
        draining = client.system.Drain(system_pb2.DrainRequest(timeout=duration_pb2.Duration(seconds=20)))
        while not (await client.system.GetLoad(system_pb2.GetLoadRequest())).draining:
            await asyncio.sleep(0)
        code, _, details = await refused(client.generate(text="x"))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert details["ErrorInfo"].reason == "DRAINING"
        assert (await running_call).token_ids[0] == client.expected("x", 0, 30)
        result = await draining
        assert (result.num_finished, result.num_aborted) == (1, 0)

    play(scenario, replace(NULL, step_s=0.01))


def test_what_still_runs_at_the_end_of_a_drain_is_aborted_with_what_it_has(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        call = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=250, seed=0)))
        await until(lambda: client.null.engine.counts.kv_pages > 0)
        result = await client.system.Drain(system_pb2.DrainRequest(timeout=duration_pb2.Duration(nanos=200_000_000)))
        assert (result.num_finished, result.num_aborted) == (0, 1)
        answer = await call
        assert answer.finished[0].finish_reason == pb.FINISH_REASON_ABORTED
        assert answer.token_ids[0] == client.expected("x", 0, len(answer.token_ids[0]))

    play(scenario, replace(NULL, step_s=0.02))


@pytest.mark.parametrize("seconds", [-1, 3601])
def test_a_drain_timeout_out_of_range_is_refused(play: Callable[..., None], seconds: int) -> None:
    async def scenario(client: Client) -> None:
        request = system_pb2.DrainRequest(timeout=duration_pb2.Duration(seconds=seconds))
        code, _, details = await refused(client.system.Drain(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == "timeout"
        assert (await client.generate(text="x", sampling=sampling(max_tokens=1))).finished

    play(scenario)


def test_server_info_and_load_describe_the_data_plane(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        info = await client.system.GetServerInfo(system_pb2.GetServerInfoRequest())
        assert (info.base_model, info.architecture) == ("null", "Null")
        assert (info.limits.max_model_len, info.limits.vocab_size, info.limits.max_lora_rank) == (256, VOCAB_SIZE, 64)
        assert info.data_planes[0].num_pages == 64
        load = await client.system.GetLoad(system_pb2.GetLoadRequest())
        plane = load.data_planes[0]
        assert plane.connected
        assert plane.pool.num_pages == 64
        assert plane.pool.kv_pages + plane.pool.adapter_pages + plane.pool.free_pages == 64

    play(scenario)


def test_load_adds_up_the_time_of_all_steps(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        await client.generate(text="x", sampling=sampling(max_tokens=8))
        (plane,) = (await client.system.GetLoad(system_pb2.GetLoadRequest())).data_planes
        assert plane.num_steps >= 8
        assert plane.step_time.ToTimedelta() > plane.last_step_time.ToTimedelta() > timedelta()

    play(scenario)
