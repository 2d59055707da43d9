"""How a call was refused: its status and every detail that came with it. Knows nothing of adapters."""

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

Code = grpc.StatusCode


@dataclass
class Refusal:
    """How a call was refused; filled when its `refused` block ends."""

    message: str = ""
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    details: list[Any] = field(default_factory=list)

    def detail(self, kind: type[Any]) -> Any:
        """The detail of that kind."""
        for packed in self.details:
            message = kind()
            if packed.Unpack(message):
                return message
        raise AssertionError(f"no {kind.__name__} in {self.details}")

    @property
    def fields(self) -> list[str]:
        """Fields of a BadRequest."""
        return [v.field for v in self.detail(error_details_pb2.BadRequest).field_violations]


class Refused:
    """Expects one call to fail with a code, and a text in its message."""

    def __init__(self, code: grpc.StatusCode, text: str = "") -> None:
        self.code, self.text, self.refusal = code, text, Refusal()

    def __enter__(self) -> Refusal:
        return self.refusal

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        assert isinstance(error, grpc.aio.AioRpcError), f"expected {self.code}, got {error!r}"
        assert error.code() is self.code, error
        assert self.text in (error.details() or ""), error.details()
        status = rpc_status.from_call(error)
        self.refusal.details = list(status.details)
        info = self.refusal.detail(error_details_pb2.ErrorInfo)
        assert info.domain == "loraplane"
        self.refusal.message, self.refusal.reason, self.refusal.metadata = status.message, info.reason, dict(info.metadata)
        return True
