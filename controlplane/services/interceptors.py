"""What stands between every call and its handler: who is calling, and how an error is told.

Health and reflection are open to all; the registry and drain need an admin. Anything a handler raises becomes a status here and
nowhere else; a bug becomes INTERNAL with an id under which the log has the traceback.
"""

import functools
import inspect
import logging
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from adapter_store.errors import AdapterStoreError
from controlplane.errors import InternalError, InvalidArgumentError, ServiceError
from controlplane.services.auth import Authenticator, require_admin, set_current_caller
from controlplane.services.rpc_status import from_store_error, rpc_status

log = logging.getLogger(__name__)

_OPEN_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")
_ADMIN_PREFIXES = ("/loraplane.v1.AdapterService/", "/loraplane.v1.SystemService/Drain")

# Handlers of the four kinds differ in type alone; this module treats them alike.
_Handler = Callable[[Any, Any], Any]
_Context = grpc.aio.ServicerContext[Any, Any]


class CallGuard(grpc.aio.ServerInterceptor):
    """Authenticates every call and turns what its handler raises into a status."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(_OPEN_PREFIXES):
            return handler
        return _rewrap(handler, functools.partial(self._guarded, method))

    def _guarded(self, method: str, behavior: _Handler) -> _Handler:
        """The handler with authentication before it and error mapping around it."""

        def enter(context: _Context) -> None:
            authorization = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), None)
            caller = self._authenticator.authenticate(authorization if isinstance(authorization, str) else None)
            if method.startswith(_ADMIN_PREFIXES):
                require_admin(caller, method)
            set_current_caller(caller)

        async def call(request: Any, context: _Context) -> Any:
            try:
                with _service_errors(method):
                    enter(context)
                    return await behavior(_read(request), context)
            except ServiceError as error:
                await _abort(context, error)

        async def stream(request: Any, context: _Context) -> AsyncIterator[Any]:
            try:
                with _service_errors(method):
                    enter(context)
                    async for response in behavior(_read(request), context):
                        yield response
            except ServiceError as error:
                await _abort(context, error)

        return stream if inspect.isasyncgenfunction(behavior) else call


@contextmanager
def _service_errors(method: str) -> Iterator[None]:
    """Lets nothing out but ServiceError, gRPC's own AbortError and cancellation."""
    try:
        yield
    except (ServiceError, grpc.aio.AbortError):
        raise
    except AdapterStoreError as error:
        raise from_store_error(error) from error
    except Exception as error:
        error_id = secrets.token_hex(8)
        log.exception("rpc failed: method=%s error_id=%s", method, error_id)
        raise InternalError(
            f"internal error; the server's log has it under id {error_id}", metadata={"error_id": error_id}
        ) from error


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a request whose bytes are no message; gRPC itself would answer UNKNOWN and log it as our bug."""

    description: str


def _readable_or_not(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserializer that never raises; None for a handler that takes bytes as they are."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Unreadable(f"has {len(data)} bytes that cannot be read as the message of this call: {error}")

    return read


def _read(request: Any) -> Any:
    """The request, or the stream of requests, that a handler may have. Raises InvalidArgumentError for what is no message."""
    if isinstance(request, _Unreadable):
        raise InvalidArgumentError.of("request", request.description, reason="MALFORMED_MESSAGE")
    return _read_each(request) if isinstance(request, AsyncIterable) else request


async def _read_each(requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _read(request)


async def _abort(context: _Context, error: ServiceError) -> None:
    status = rpc_status(error)
    await context.abort(status.code, status.message, status.trailing_metadata)


def _rewrap(handler: Any, guarded: Callable[[_Handler], _Handler]) -> Any:
    """The same kind of handler around a guarded behavior."""
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    name, make = kinds[handler.request_streaming, handler.response_streaming]
    behavior: _Handler = getattr(handler, name)
    return make(
        guarded(behavior),
        request_deserializer=_readable_or_not(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )
