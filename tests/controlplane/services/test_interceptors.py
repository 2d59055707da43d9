"""What a client sees of whatever a handler raises, for each of the four kinds of rpc."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from adapter_store.errors import AdapterCorruptError
from controlplane.errors import NotFoundError
from controlplane.services.auth import ANYBODY, Authenticator, Caller, current_caller
from controlplane.services.interceptors import CallGuard
from controlplane.services.rpc_status import DETAILS_KEY

KINDS = ["unary_unary", "unary_stream", "unary_stream_writer", "stream_unary", "stream_stream"]


def raiser(what: BaseException | None, seen: list[Caller]) -> dict[str, Any]:
    """Handlers of each kind that note their caller and then raise, or answer b"ok"."""

    async def unary(request: Any, context: Any) -> bytes:
        seen.append(current_caller())
        if what is not None:
            raise what
        return b"ok"

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        seen.append(current_caller())
        yield b"ok"
        if what is not None:
            raise what

    async def writer(request: Any, context: Any) -> None:
        await context.write(await unary(request, context))

    return {
        "unary_unary": grpc.unary_unary_rpc_method_handler(unary),
        "unary_stream": grpc.unary_stream_rpc_method_handler(stream),
        "unary_stream_writer": grpc.unary_stream_rpc_method_handler(writer),
        "stream_unary": grpc.stream_unary_rpc_method_handler(unary),
        "stream_stream": grpc.stream_stream_rpc_method_handler(stream),
    }


def call(kind: str, what: BaseException | None, authenticator: Authenticator, token: str | None = None) -> list[Caller]:
    """Calls one handler over real gRPC; returns the callers that it saw."""

    async def run() -> list[Caller]:
        seen: list[Caller] = []
        server = grpc.aio.server(interceptors=[CallGuard(authenticator)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", raiser(what, seen)),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                multi: Any = getattr(channel, kind.removesuffix("_writer"))(f"/test.Service/{kind}")
                request: Any = iter([b"x"]) if kind.startswith("stream") else b"x"
                metadata = (("authorization", f"Bearer {token}"),) if token else ()
                answer = multi(request, metadata=metadata, timeout=30)
                if kind in ("unary_unary", "stream_unary"):
                    assert await answer == b"ok"
                else:
                    assert [message async for message in answer] == [b"ok"]
        finally:
            await server.stop(None)
        return seen

    return asyncio.run(run())


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    details = dict(error.trailing_metadata() or ())[DETAILS_KEY]
    assert isinstance(details, bytes)
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_passes_and_its_handler_knows_the_caller(kind: str) -> None:
    assert call(kind, None, Authenticator()) == [ANYBODY]
    known = Caller("acme", is_admin=False)
    assert call(kind, None, Authenticator({"t": known}), token="t") == [known]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_caller_never_reaches_the_handler(kind: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        call(kind, RuntimeError("reached"), Authenticator({"t": ANYBODY}), token="other")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (NotFoundError("t", "x", "no x here", reason="X_NOT_FOUND"), grpc.StatusCode.NOT_FOUND, "X_NOT_FOUND"),
        (AdapterCorruptError("f.safetensors", "t", "3 bytes"), grpc.StatusCode.DATA_LOSS, "WEIGHTS_CORRUPT"),
    ],
)
def test_an_error_made_for_clients_arrives_whole(kind: str, error: Exception, code: grpc.StatusCode, reason: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        call(kind, error, Authenticator())
    assert (caught.value.code(), caught.value.details()) == (code, str(error))
    assert error_info(caught.value).reason == reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_bug_shows_an_id_and_nothing_else_and_the_log_has_the_rest(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
        call(kind, RuntimeError("secret detail"), Authenticator())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details())
    error_id = error_info(caught.value).metadata["error_id"]
    [record] = [record for record in caplog.records if record.name == "controlplane.services.interceptors"]
    assert error_id in record.getMessage()
    assert record.exc_info is not None
    assert "secret detail" in str(record.exc_info[1])
