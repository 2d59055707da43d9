"""Every way a call of the control plane can fail, as one tree of exceptions that carry what the client should be told.

Knows gRPC's status codes and nothing of protobuf: `rpc_status` turns these into `google.rpc.Status`.

    ServiceError
    ├── InvalidArgumentError      INVALID_ARGUMENT     field violations
    ├── OutOfRangeError           OUT_OF_RANGE
    ├── NotFoundError             NOT_FOUND            resource
    ├── AlreadyExistsError        ALREADY_EXISTS       resource
    ├── AbortedError              ABORTED              retry
    │   └── EtagMismatchError
    ├── PreconditionError         FAILED_PRECONDITION  precondition violations
    ├── ResourceExhaustedError    RESOURCE_EXHAUSTED   quota, retry
    │   └── QueueFullError
    ├── UnavailableError          UNAVAILABLE          retry
    ├── DataLossError             DATA_LOSS
    ├── UnauthenticatedError      UNAUTHENTICATED
    ├── PermissionDeniedError     PERMISSION_DENIED
    ├── DeadlineError             DEADLINE_EXCEEDED
    └── InternalError             INTERNAL
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc

DEFAULT_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that cannot be taken: its path, and a sentence with the value and the limit."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class PreconditionViolation:
    """One reason why the state of the service forbids the call: kind, such as "LORA_RANK", what it is about, and a sentence."""

    kind: str
    subject: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """What was not found, or exists already: type, such as "loraplane.v1.Adapter", and name."""

    type: str
    name: str


class ServiceError(Exception):
    """A failed call: status code, a message for people, and a reason and metadata for programs."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidArgumentError(ServiceError):
    """Fields of the request are malformed or out of range; all of them are listed."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, violations: Sequence[FieldViolation], *, reason: str = "INVALID_FIELD") -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations), reason=reason)
        self.violations = tuple(violations)

    @classmethod
    def of(cls, field: str, description: str, *, reason: str = "INVALID_FIELD") -> "InvalidArgumentError":
        """The error of a single field."""
        return cls([FieldViolation(field, description)], reason=reason)


class OutOfRangeError(ServiceError):
    """A position, such as a revision to watch from, is no longer or not yet valid."""

    code = grpc.StatusCode.OUT_OF_RANGE

    def __init__(self, message: str, *, reason: str = "OUT_OF_RANGE", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, reason=reason, metadata=metadata)


class NotFoundError(ServiceError):
    """Nothing of that name."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, resource_type: str, name: str, message: str | None = None, *, reason: str = "NOT_FOUND") -> None:
        super().__init__(message or f"{resource_type} {name!r} does not exist", reason=reason, metadata={"name": name})
        self.resource = Resource(resource_type, name)


class AlreadyExistsError(ServiceError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS

    def __init__(self, resource_type: str, name: str, message: str | None = None, *, reason: str = "ALREADY_EXISTS") -> None:
        super().__init__(message or f"{resource_type} {name!r} exists already", reason=reason, metadata={"name": name})
        self.resource = Resource(resource_type, name)


class AbortedError(ServiceError):
    """The call was given up by the service; it may succeed when repeated."""

    code = grpc.StatusCode.ABORTED

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


class EtagMismatchError(AbortedError):
    """Somebody changed the resource after the caller read it."""

    def __init__(self, name: str, expected: str, found: str) -> None:
        super().__init__(
            f"{name!r} has changed: its etag is {found!r}, the call gave {expected!r}; read it again and retry",
            reason="ETAG_MISMATCH",
            metadata={"name": name, "expected": expected, "found": found},
        )


class PreconditionError(ServiceError):
    """The state of the service or of a resource forbids the call until somebody changes that state."""

    code = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(
        self,
        message: str,
        violations: Sequence[PreconditionViolation] = (),
        *,
        reason: str = "FAILED_PRECONDITION",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)


class ResourceExhaustedError(ServiceError):
    """A bound is reached: `subject` names what is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(
        self,
        message: str,
        *,
        subject: str,
        reason: str = "RESOURCE_EXHAUSTED",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = DEFAULT_RETRY_S,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)
        self.subject = subject


class QueueFullError(ResourceExhaustedError):
    """The waiting queue is full."""

    def __init__(self, num_waiting: int, max_waiting: int, *, retry_after_s: float = DEFAULT_RETRY_S) -> None:
        super().__init__(
            f"the waiting queue is full: {num_waiting} requests wait, at most {max_waiting} may; retry later",
            subject="waiting_queue",
            reason="QUEUE_FULL",
            metadata={"num_waiting": str(num_waiting), "max_waiting": str(max_waiting)},
            retry_after_s=retry_after_s,
        )


class UnavailableError(ServiceError):
    """Something that the call needs is away for now: a data plane, the registry, or the service itself while it drains."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(
        self,
        message: str,
        *,
        reason: str = "UNAVAILABLE",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float = DEFAULT_RETRY_S,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


class DataLossError(ServiceError):
    """Stored or sent weights are corrupt; metadata names the file and what was found."""

    code = grpc.StatusCode.DATA_LOSS

    def __init__(self, message: str, *, reason: str = "WEIGHTS_CORRUPT", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, reason=reason, metadata=metadata)


class UnauthenticatedError(ServiceError):
    """No credential, or none that is known."""

    code = grpc.StatusCode.UNAUTHENTICATED

    def __init__(self, message: str, *, reason: str = "UNAUTHENTICATED") -> None:
        super().__init__(message, reason=reason)


class PermissionDeniedError(ServiceError):
    """The caller is known and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED

    def __init__(self, message: str, *, reason: str = "PERMISSION_DENIED", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, reason=reason, metadata=metadata)


class DeadlineError(ServiceError):
    """The deadline of the call passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED

    def __init__(self, message: str, *, reason: str = "DEADLINE_EXCEEDED") -> None:
        super().__init__(message, reason=reason)


class InternalError(ServiceError):
    """A bug. The message must hold nothing but what a client may see."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, reason: str = "INTERNAL", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
