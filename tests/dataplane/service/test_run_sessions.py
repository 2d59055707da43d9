"""The rpc Run: sessions that break, close and take over, and breaches of its protocol."""

import asyncio
from typing import Any

import grpc
import pytest

from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import (
    BatchUpdate,
    Hello,
    StepReport,
    hello_to_proto,
    update_to_proto,
)
from tests.dataplane.service.served import TIMEOUT_S, Control, Served, admitted, reason_of, serving


def test_a_session_that_breaks_leaves_its_requests_held_for_the_next(served: Served) -> None:
    async def run() -> StepReport:
        async with serving(served.config) as channel:
            control = await Control.open(channel)
            await control.update(admit=(admitted(1, [3], 200),))
            await control.read()
            control.call.cancel()
            second = await Control.open(channel)
            await second.update(abort=(1,), admit=(admitted(2, [3], 3),))
            assert len((await second.read_until_finished(1))[2]) == 3
            return second.first

    first = asyncio.run(run())
    assert first.state is not None
    assert first.state.held_request_keys == (1,)


def test_a_session_that_closes_its_side_ends_without_an_error(served: Served) -> None:
    async def run() -> grpc.StatusCode:
        async with serving(served.config) as channel:
            control = await Control.open(channel)
            await control.call.done_writing()
            assert await control.call.read() is grpc.aio.EOF
            code: grpc.StatusCode = await control.call.code()
            return code

    assert asyncio.run(run()) is grpc.StatusCode.OK


def test_a_second_session_takes_over(served: Served) -> None:
    async def run() -> grpc.aio.AioRpcError:
        async with serving(served.config) as channel:
            first = await Control.open(channel)
            await Control.open(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await first.read()
            return raised.value

    error = asyncio.run(run())
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ABORTED, "SESSION_TAKEN_OVER")


@pytest.mark.parametrize(
    ("messages", "code", "reason", "text"),
    [
        ([hello_to_proto(Hello("s", 1))], grpc.StatusCode.FAILED_PRECONDITION, "EPOCH_MISMATCH", "hello names epoch 1"),
        ([update_to_proto(BatchUpdate(1))], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "must be hello"),
        ([pb.RunRequest()], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "must be hello"),
        (["hello", update_to_proto(BatchUpdate(2))], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "2, expected 1"),
        (["hello", "hello"], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "a second time"),
        (["hello", pb.RunRequest()], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "neither is set"),
    ],
)
def test_a_breach_of_the_protocol_fails_closed(
    served: Served, messages: list[Any], code: grpc.StatusCode, reason: str, text: str
) -> None:
    async def run() -> grpc.aio.AioRpcError:
        async with serving(served.config) as channel:
            stub = pb_grpc.DataPlaneServiceStub(channel)
            epoch = (await stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)).epoch
            call = stub.Run(timeout=TIMEOUT_S)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                for message in messages:
                    await call.write(hello_to_proto(Hello("s", epoch)) if message == "hello" else message)
                while await call.read() is not grpc.aio.EOF:
                    pass
            return raised.value

    error = asyncio.run(run())
    assert (error.code(), reason_of(error)) == (code, reason)
    assert text in (error.details() or "")
