"""`grpc.health.v1`: whether the service as a whole, and each of its services, takes requests.

Knows nothing of what makes it healthy: somebody calls `set_serving`. The servicer of the grpcio-health-checking package is not
used as its Watch, once one of several watchers of a service has left, tells the others nothing more.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no type information
    """One status for all services; not serving until told otherwise."""

    def __init__(self, services: Iterable[str]) -> None:
        """services: full names; "" stands for the whole and is always there."""
        self._services = frozenset(services) | {""}
        self._is_serving = False
        self._changed = asyncio.Event()

    def set_serving(self, is_serving: bool) -> None:
        """Changes the status and tells every watcher."""
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: "Context") -> health_pb2.HealthCheckResponse:
        """The status of one service; NOT_FOUND for one that is not here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:200]!r} here")
        return self._response(request.service)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: "Context"
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, and at every change."""
        while True:
            changed = self._changed
            yield self._response(request.service)
            await changed.wait()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        statuses = health_pb2.HealthCheckResponse
        if service not in self._services:
            return health_pb2.HealthCheckResponse(status=statuses.SERVICE_UNKNOWN)
        return health_pb2.HealthCheckResponse(status=statuses.SERVING if self._is_serving else statuses.NOT_SERVING)
