"""Turns errors into what travels: a status code, a message and `google.rpc` details in the trailers.

The one mapping of the service, for its own errors and those of the adapter store. Keeps the whole within what HTTP/2 trailers
may hold (8 KiB), as a longer status would never arrive.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from adapter_store import errors as store_errors
from controlplane.errors import (
    AlreadyExistsError,
    DataLossError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    PreconditionViolation,
    ResourceExhaustedError,
    ServiceError,
)
from protos.planes import duration_from_seconds

DOMAIN = "loraplane"
DETAILS_KEY = "grpc-status-details-bin"

# Of the 8 KiB, details travel in base64 and the message twice, percent-encoded where it is not ASCII.
_MAX_MESSAGE_BYTES = 1000
_MAX_DETAILS_BYTES = 3500
_MAX_TEXT_BYTES = 400

SOURCE_TYPE = "loraplane.v1.AdapterSource"

_Violation = TypeVar("_Violation", bound=Message)


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """How a call ends."""

    code: StatusCode
    message: str
    details: bytes

    @property
    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The trailers that carry the details."""
        return ((DETAILS_KEY, self.details),)


def rpc_status(error: ServiceError) -> RpcStatus:
    """What a client is told of an error."""
    message = _cut(error.message, _MAX_MESSAGE_BYTES)
    number: int = error.code.value[0]
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={key: _cut(value, _MAX_TEXT_BYTES) for key, value in error.metadata.items()},
        )
    ]
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_from_seconds(error.retry_after_s)))
    details.extend(_own_details(error))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=number, message=message, details=packed)
    return RpcStatus(error.code, message, status.SerializeToString())


def from_store_error(error: store_errors.AdapterStoreError) -> ServiceError:
    """An error of the adapter store as an error of the service."""
    message = str(error)
    match error:
        case store_errors.SourceNotFoundError():
            return NotFoundError(SOURCE_TYPE, error.source, message, reason="SOURCE_NOT_FOUND")
        case store_errors.SourceForbiddenError():
            return PermissionDeniedError(message, reason="SOURCE_FORBIDDEN", metadata={"source": error.source})
        case store_errors.UploadError():
            return InvalidArgumentError.of(error.field, error.description, reason="UPLOAD_INVALID")
        case store_errors.AdapterRejectedError():
            violations = [PreconditionViolation(v.kind, v.subject, v.description) for v in error.violations]
            return PreconditionError(message, violations, reason="ADAPTER_REJECTED")
        case store_errors.AdapterCorruptError():
            found = {"file": error.file, "tensor": error.tensor, "found": error.found}
            return DataLossError(message, metadata=found)
        case store_errors.ImageNotFoundError():
            return DataLossError(message, reason="IMAGE_MISSING", metadata={"version": error.digest})
        case store_errors.StoreFullError():
            return ResourceExhaustedError(message, subject=error.subject, reason="STORE_FULL")
        case _:
            return InternalError(f"the adapter store failed: {message}")


def _own_details(error: ServiceError) -> Iterable[Message]:
    """The details that belong to the kind of error."""
    match error:
        case InvalidArgumentError():
            violations = [
                error_details_pb2.BadRequest.FieldViolation(field=v.field, description=_cut(v.description, _MAX_TEXT_BYTES))
                for v in error.violations
            ]
            more = error_details_pb2.BadRequest.FieldViolation(description="more fields are wrong; they are not listed")
            yield error_details_pb2.BadRequest(field_violations=_bounded(violations, more))
        case PreconditionError() if error.violations:
            listed = [
                error_details_pb2.PreconditionFailure.Violation(
                    type=v.kind, subject=_cut(v.subject, _MAX_TEXT_BYTES), description=_cut(v.description, _MAX_TEXT_BYTES)
                )
                for v in error.violations
            ]
            rest = error_details_pb2.PreconditionFailure.Violation(type="MORE_VIOLATIONS", description="more are not listed")
            yield error_details_pb2.PreconditionFailure(violations=_bounded(listed, rest))
        case NotFoundError() | AlreadyExistsError():
            resource = error.resource
            yield error_details_pb2.ResourceInfo(
                resource_type=resource.type,
                resource_name=_cut(resource.name, _MAX_TEXT_BYTES),
                description=_cut(error.message, _MAX_TEXT_BYTES),
            )
        case ResourceExhaustedError():
            quota = error_details_pb2.QuotaFailure.Violation(
                subject=error.subject, description=_cut(error.message, _MAX_TEXT_BYTES)
            )
            yield error_details_pb2.QuotaFailure(violations=[quota])


def _bounded(violations: list[_Violation], more: _Violation) -> list[_Violation]:
    """As many violations as fit, and a word about the rest."""
    kept: list[_Violation] = []
    size = 0
    for violation in violations:
        size += violation.ByteSize()
        if size > _MAX_DETAILS_BYTES:
            return [*kept, more]
        kept.append(violation)
    return kept


def _cut(text: str, max_bytes: int) -> str:
    """Text that takes at most so many bytes once percent-encoded (three for each byte that is not printable ASCII)."""
    size = 0
    for index, char in enumerate(text):
        size += 1 if " " <= char <= "~" else 3 * len(char.encode("utf-8", errors="replace"))
        if size > max_bytes:
            return text[:index] + "..."
    return text
