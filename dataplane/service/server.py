"""The gRPC server of a data plane process, from its first listening to its end. Knows the engine as a thread and an inbox."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from dataplane.assembly import DataPlane
from dataplane.service.servicer import DataPlaneServicer
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DataPlaneService"].full_name

# An update carries prompts in full, and a control plane cuts it well below this.
MAX_MESSAGE_BYTES = 16 << 20

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Two processes on one port would each get some of the calls.
    ("grpc.so_reuseport", 0),
)


class ListenError(Exception):
    """An address cannot be listened on."""


class DataPlaneServer:
    """Serves one data plane until it is stopped or its engine fails."""

    def __init__(self, data_plane: DataPlane, listen: Sequence[str], stop_timeout_s: float) -> None:
        self._data_plane = data_plane
        self._listen = tuple(listen)
        self._stop_timeout_s = stop_timeout_s
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.HealthServicer()
        self._engine_failed = asyncio.Event()
        self._engine_thread: threading.Thread | None = None

    async def start(self) -> tuple[str, ...]:
        """Starts the engine and listens. Returns the addresses, with the ports that were found for port 0.

        Raises:
            ListenError: an address is taken or malformed.
        """
        pb_grpc.add_DataPlaneServiceServicer_to_server(  # type: ignore[no-untyped-call, unused-ignore]
            DataPlaneServicer(self._data_plane.inbox, self._data_plane.description), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        addresses = tuple(self._bind(address) for address in self._listen)
        await self._server.start()
        loop = asyncio.get_running_loop()
        self._engine_thread = self._data_plane.start_engine(lambda: _call_on(loop, self._engine_failed))
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return addresses

    async def wait_for_failure(self) -> None:
        """Returns when the engine has failed; the service is NOT_SERVING by then."""
        await self._engine_failed.wait()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self) -> None:
        """NOT_SERVING first, then the engine ends the session, then the port closes; within the configured limit."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._data_plane.engine.stop()
        if self._engine_thread is not None:
            await asyncio.to_thread(self._engine_thread.join, self._stop_timeout_s)
            if self._engine_thread.is_alive():
                _log.error("engine still in a step after stop_timeout_s=%g", self._stop_timeout_s)
        await self._server.stop(grace=1.0)
        await asyncio.to_thread(self._data_plane.host_cache.close)

    def _bind(self, address: str) -> str:
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ListenError(f"--listen {address}: the address is taken, or is neither HOST:PORT nor unix:PATH") from error
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)


def _call_on(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets an event of the loop from another thread; a loop that is closed needs it no more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)
