"""DataPlaneService over gRPC: turns streams into sessions and messages for the engine. Computes nothing and holds no state."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from dataplane.engine.inbox import Inbox, RoomForReports, SessionEnd, SessionLost, SessionOpened, UpdateReceived
from dataplane.service.session import Session, SessionEndedError
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import BatchUpdate, Hello, reports_to_proto, run_request_from_proto

_log = logging.getLogger(__name__)

DOMAIN = "loraplane"
HELLO_TIMEOUT_S = 10.0

Context = grpc.aio.ServicerContext[Any, Any]

# How a stream ends for the control plane; CLIENT_DONE alone is no error.
_ENDS = {
    SessionEnd.PROTOCOL_VIOLATION: (grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION"),
    SessionEnd.TAKEN_OVER: (grpc.StatusCode.ABORTED, "SESSION_TAKEN_OVER"),
    SessionEnd.SHUTTING_DOWN: (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    SessionEnd.ENGINE_FAILED: (grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
}

_DESCRIPTIONS = {
    SessionEnd.TAKEN_OVER: "another session has taken over this data plane",
    SessionEnd.SHUTTING_DOWN: "the data plane is shutting down",
    SessionEnd.ENGINE_FAILED: "the engine failed; its log says why",
}


class DataPlaneServicer(pb_grpc.DataPlaneServiceServicer):
    """One engine's service. The handlers enqueue and await."""

    def __init__(self, inbox: Inbox, description: pb.DescribeResponse) -> None:
        self._inbox = inbox
        self._description = description

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """What this data plane is."""
        return self._description

    async def Run(self, request_iterator: AsyncIterator[pb.RunRequest], context: Context) -> AsyncIterator[pb.RunResponse]:
        """One session, for as long as its control plane lives: the one rpc without a deadline; keepalive notices a dead peer."""
        hello = await self._receive_hello(request_iterator, context)
        session = Session(hello.session_id, on_room=lambda: self._inbox.put(RoomForReports()))
        self._inbox.put(SessionOpened(session))
        reader = asyncio.create_task(self._read_updates(session, request_iterator), name=f"updates of {hello.session_id}")
        try:
            while True:
                yield reports_to_proto(await session.next_reports())
        except SessionEndedError as error:
            if error.end is not SessionEnd.CLIENT_DONE:
                code, reason = _ENDS[error.end]
                await _abort(context, code, reason, _DESCRIPTIONS.get(error.end, str(error)))
        finally:
            reader.cancel()
            self._inbox.put(SessionLost(session))

    async def _receive_hello(self, messages: AsyncIterator[pb.RunRequest], context: Context) -> Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = run_request_from_proto(await anext(messages))
        except (ValueError, StopAsyncIteration, TimeoutError) as error:
            first = None
            _log.warning("no hello peer=%s error=%r", context.peer(), error)
        if not isinstance(first, Hello):
            code, reason = _ENDS[SessionEnd.PROTOCOL_VIOLATION]
            await _abort(context, code, reason, f"the first message must be hello, within {HELLO_TIMEOUT_S:g} s")
        if first.epoch != self._description.epoch:
            text = f"hello names epoch {first.epoch}; this start of the data plane has epoch {self._description.epoch}"
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, "EPOCH_MISMATCH", f"{text}; call Describe and reconcile")
        return first

    async def _read_updates(self, session: Session, messages: AsyncIterator[pb.RunRequest]) -> None:
        """Passes updates on until the stream ends or breaks its protocol."""
        expected = 1
        try:
            async for message in messages:
                update = run_request_from_proto(message)
                if not isinstance(update, BatchUpdate):
                    raise ValueError("hello came a second time; it opens a session once")
                if update.sequence != expected:
                    raise ValueError(f"update has sequence {update.sequence}, expected {expected}")
                expected += 1
                await session.wait_for_credit()
                self._inbox.put(UpdateReceived(session, update))
        except ValueError as error:
            _log.error("protocol violation session=%s error=%s", session.session_id, error)
            session.close(SessionEnd.PROTOCOL_VIOLATION, str(error))
        else:
            session.close(SessionEnd.CLIENT_DONE)


async def _abort(context: Context, code: grpc.StatusCode, reason: str, description: str) -> NoReturn:
    """Ends the call with this status and a google.rpc.ErrorInfo."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    status = status_pb2.Status(code=code.value[0], message=description, details=[detail])
    await context.abort(code, description, (("grpc-status-details-bin", status.SerializeToString()),))
