"""The gRPC server of the control plane: addresses, limits and keepalive, and which services it has.

Knows nothing of what the services do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controlplane.services.auth import Authenticator
from controlplane.services.health import HealthService
from controlplane.services.interceptors import CallGuard
from protos.loraplane.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)

# Weights go by upload chunks or by source, never in one message.
MAX_MESSAGE_BYTES = 16 << 20
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
# Clients may ping as often as this server does, some slack included.
MIN_PING_INTERVAL_MS = 20_000
# Connections are renewed now and then, so that clients spread over the servers that there are; streams may go on meanwhile.
MAX_CONNECTION_AGE_MS = 3_600_000
MAX_CONNECTION_AGE_GRACE_MS = 3_600_000

SERVICE_NAMES = tuple(
    descriptor.services_by_name[name].full_name
    for descriptor, name in (
        (inference_pb2.DESCRIPTOR, "InferenceService"),
        (adapter_pb2.DESCRIPTOR, "AdapterService"),
        (system_pb2.DESCRIPTOR, "SystemService"),
    )
)


@dataclass(frozen=True, slots=True)
class Servicers:
    """What the server answers with."""

    inference: inference_pb2_grpc.InferenceServiceServicer
    adapters: adapter_pb2_grpc.AdapterServiceServicer
    system: system_pb2_grpc.SystemServiceServicer
    health: HealthService


class ListenError(Exception):
    """An address cannot be listened on."""


def build_server(servicers: Servicers, authenticator: Authenticator) -> grpc.aio.Server:
    """A server with all services, not listening yet."""
    server = grpc.aio.server(
        interceptors=[CallGuard(authenticator)],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_MS),
            ("grpc.max_connection_age_grace_ms", MAX_CONNECTION_AGE_GRACE_MS),
            # Two control planes on one port would each get some of the connections, unnoticed.
            ("grpc.so_reuseport", 0),
        ],
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicers.inference, server)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(servicers.adapters, server)
    system_pb2_grpc.add_SystemServiceServicer_to_server(servicers.system, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicers.health, server)
    reflection.enable_server_reflection((*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def listen(server: grpc.aio.Server, addresses: Sequence[str]) -> tuple[str, ...]:
    """Binds the server; returns the addresses with the port that the system chose where 0 was asked for.

    Raises:
        ListenError: an address is malformed or in use.
    """
    bound = []
    for address in addresses:
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {address!r}: {error}; is it in use, or not of the form host:port?") from error
        is_path = address.startswith(("unix:", "unix-abstract:"))
        bound.append(address if is_path else f"{address.rpartition(':')[0]}:{port}")
    return tuple(bound)
