"""What a client that takes `service_config.json` does: it asks again when the service is away, and at no other time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import inference_pb2_grpc, system_pb2, system_pb2_grpc

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
TIMEOUT_S = 30.0


class Flaky(inference_pb2_grpc.InferenceServiceServicer, system_pb2_grpc.SystemServiceServicer):
    """Fails the first calls with a code, before or after the first message, and then answers."""

    def __init__(self, code: grpc.StatusCode, num_failures: int, fails_late: bool = False) -> None:
        self.code, self.num_failures, self.fails_late = code, num_failures, fails_late
        self.num_calls = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.num_calls += 1
        fails = self.num_calls <= self.num_failures
        if fails and not self.fails_late:
            await context.abort(self.code, "not now")
        yield pb.GenerateResponse(started=pb.Started())
        if fails:
            await context.abort(self.code, "not any more")
        yield pb.GenerateResponse(finished=pb.Finished())

    async def GetLoad(self, request: system_pb2.GetLoadRequest, context: Any) -> system_pb2.GetLoadResponse:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            await context.abort(self.code, "not now")
        return system_pb2.GetLoadResponse()

    async def GetServerInfo(self, request: system_pb2.GetServerInfoRequest, context: Any) -> system_pb2.GetServerInfoResponse:
        raise AssertionError("not called")

    async def Drain(self, request: system_pb2.DrainRequest, context: Any) -> system_pb2.DrainResponse:
        raise AssertionError("not called")


@pytest.fixture
def call(repository: Path) -> Callable[..., grpc.StatusCode]:
    """Calls a method of a flaky service through a channel with the service config; returns how that ended."""
    config = (repository / "controlplane" / "service_config.json").read_text()

    async def run(flaky: Flaky, method: str) -> grpc.StatusCode:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(flaky, server)
        system_pb2_grpc.add_SystemServiceServicer_to_server(flaky, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.service_config", config)]) as channel:
            try:
                if method == "GetLoad":
                    await system_pb2_grpc.SystemServiceStub(channel).GetLoad(system_pb2.GetLoadRequest(), timeout=TIMEOUT_S)
                else:
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    async for _ in stub.Generate(pb.GenerateRequest(text="x"), timeout=TIMEOUT_S):
                        pass
                code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                code = error.code()
        await server.stop(None)
        return code

    return lambda flaky, method: asyncio.run(run(flaky, method))


@pytest.mark.parametrize("method", ["GetLoad", "Generate"])
def test_a_service_that_is_away_is_asked_again(call: Callable[..., grpc.StatusCode], method: str) -> None:
    flaky = Flaky(UNAVAILABLE, num_failures=2)
    assert call(flaky, method) is grpc.StatusCode.OK
    assert flaky.num_calls == 3


@pytest.mark.parametrize("method", ["GetLoad", "Generate"])
def test_attempts_are_limited(call: Callable[..., grpc.StatusCode], method: str) -> None:
    flaky = Flaky(UNAVAILABLE, num_failures=100)
    assert call(flaky, method) is UNAVAILABLE
    assert 1 < flaky.num_calls <= 5


def test_generate_is_not_repeated_after_its_first_message(call: Callable[..., grpc.StatusCode]) -> None:
    flaky = Flaky(UNAVAILABLE, num_failures=1, fails_late=True)
    assert call(flaky, "Generate") is UNAVAILABLE
    assert flaky.num_calls == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL])
def test_no_other_status_is_asked_again(call: Callable[..., grpc.StatusCode], code: grpc.StatusCode) -> None:
    flaky = Flaky(code, num_failures=1)
    assert call(flaky, "Generate") is code
    assert flaky.num_calls == 1
