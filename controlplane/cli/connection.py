"""The client's channel to the service: credential, deadlines and the retry policy that the service recommends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources

import grpc

from protos.loraplane.v1 import adapter_pb2_grpc, inference_pb2_grpc, system_pb2_grpc

DEFAULT_SERVER = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Which service to talk to, as whom, and how long a call may take."""

    server: str = DEFAULT_SERVER
    token: str = ""
    timeout_s: float | None = None


class Connection:
    """Stubs of the public services over one channel."""

    def __init__(self, channel: grpc.Channel, options: ConnectionOptions) -> None:
        self.channel = channel
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self.system = system_pb2_grpc.SystemServiceStub(channel)
        self.metadata = (("authorization", f"Bearer {options.token}"),) if options.token else ()
        self._timeout_s = options.timeout_s

    def timeout_s(self, default_s: float) -> float:
        """The deadline of a call: what the caller asked for, else what suits the call."""
        return default_s if self._timeout_s is None else self._timeout_s


@contextmanager
def connect(options: ConnectionOptions) -> Iterator[Connection]:
    """A connection that is closed at the end; nothing is sent before the first call."""
    with grpc.insecure_channel(options.server, options=channel_options()) as channel:
        yield Connection(channel, options)


def channel_options() -> list[tuple[str, str | int]]:
    """Keepalive, message cap and retries as the server expects them of its clients."""
    options: list[tuple[str, str | int]] = [
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]
    service_config = resources.files("controlplane") / "service_config.json"
    if service_config.is_file():
        options.append(("grpc.service_config", service_config.read_text(encoding="utf-8")))
    return options
