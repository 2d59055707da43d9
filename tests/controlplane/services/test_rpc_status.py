"""Every error, ours and the adapter store's, as the status and details that a client receives."""

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from adapter_store import errors as store_errors
from controlplane import errors
from controlplane.services.rpc_status import DOMAIN, from_store_error, rpc_status

DETAILS = {
    "ErrorInfo": error_details_pb2.ErrorInfo,
    "BadRequest": error_details_pb2.BadRequest,
    "PreconditionFailure": error_details_pb2.PreconditionFailure,
    "ResourceInfo": error_details_pb2.ResourceInfo,
    "QuotaFailure": error_details_pb2.QuotaFailure,
    "RetryInfo": error_details_pb2.RetryInfo,
}

VIOLATION = errors.PreconditionViolation("LORA_RANK", "adapter_config.json: r", "is 128; the limit is 64")


def details_of(error: errors.ServiceError) -> dict[str, error_details_pb2.ErrorInfo]:
    """The details by name of their type."""
    status = status_pb2.Status.FromString(rpc_status(error).details)
    assert (status.code, status.message) == (error.code.value[0], rpc_status(error).message)
    found = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        found[name] = DETAILS[name]()
        assert packed.Unpack(found[name])
    return found


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (errors.InvalidArgumentError.of("text", "is empty"), StatusCode.INVALID_ARGUMENT, {"BadRequest"}),
        (errors.OutOfRangeError("trimmed"), StatusCode.OUT_OF_RANGE, set()),
        (errors.NotFoundError("loraplane.v1.Adapter", "x"), StatusCode.NOT_FOUND, {"ResourceInfo"}),
        (errors.AlreadyExistsError("loraplane.v1.Adapter", "x"), StatusCode.ALREADY_EXISTS, {"ResourceInfo"}),
        (errors.AbortedError("late", reason="SLO_EARLY_ABORT", retry_after_s=2.5), StatusCode.ABORTED, {"RetryInfo"}),
        (errors.EtagMismatchError("x", "1", "2"), StatusCode.ABORTED, set()),
        (errors.PreconditionError("no", [VIOLATION]), StatusCode.FAILED_PRECONDITION, {"PreconditionFailure"}),
        (errors.ResourceExhaustedError("no", subject="store"), StatusCode.RESOURCE_EXHAUSTED, {"QuotaFailure", "RetryInfo"}),
        (errors.QueueFullError(9, 9), StatusCode.RESOURCE_EXHAUSTED, {"QuotaFailure", "RetryInfo"}),
        (errors.UnavailableError("away"), StatusCode.UNAVAILABLE, {"RetryInfo"}),
        (errors.DataLossError("bad", metadata={"file": "f"}), StatusCode.DATA_LOSS, set()),
        (errors.UnauthenticatedError("who"), StatusCode.UNAUTHENTICATED, set()),
        (errors.PermissionDeniedError("no"), StatusCode.PERMISSION_DENIED, set()),
        (errors.DeadlineError("late"), StatusCode.DEADLINE_EXCEEDED, set()),
        (errors.InternalError("bug"), StatusCode.INTERNAL, set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_service_has_its_code_reason_and_details(
    error: errors.ServiceError, code: StatusCode, details: set[str]
) -> None:
    assert rpc_status(error).code is code
    found = details_of(error)
    assert set(found) == details | {"ErrorInfo"}
    info = found["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == (error.reason, DOMAIN, error.metadata)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (store_errors.SourceNotFoundError("/x", "does not exist"), StatusCode.NOT_FOUND),
        (store_errors.SourceForbiddenError("/x", "is outside"), StatusCode.PERMISSION_DENIED),
        (store_errors.UploadError("file.name", "is not plain"), StatusCode.INVALID_ARGUMENT),
        (
            store_errors.AdapterRejectedError([store_errors.Violation("DORA", "use_dora", "is on")]),
            StatusCode.FAILED_PRECONDITION,
        ),
        (store_errors.AdapterCorruptError("f", "t", "3 bytes"), StatusCode.DATA_LOSS),
        (store_errors.ImageNotFoundError("ab"), StatusCode.DATA_LOSS),
        (store_errors.StoreFullError("store", "is full"), StatusCode.RESOURCE_EXHAUSTED),
        (store_errors.AdapterStoreError("something else"), StatusCode.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_of_the_adapter_store_has_a_status(error: store_errors.AdapterStoreError, code: StatusCode) -> None:
    assert rpc_status(from_store_error(error)).code is code


def test_every_subclass_of_the_store_errors_is_mapped_by_name() -> None:
    # No call meets HostMemoryError: it ends a data plane's start.
    unmapped = {*store_errors.AdapterStoreError.__subclasses__()} - {store_errors.HostMemoryError}
    assert {kind.__name__ for kind in unmapped} == {
        "SourceNotFoundError",
        "SourceForbiddenError",
        "UploadError",
        "AdapterRejectedError",
        "AdapterCorruptError",
        "ImageNotFoundError",
        "StoreFullError",
    }


@pytest.mark.parametrize("filler", ["x", "é", "🙂", "\n"])
@pytest.mark.parametrize("kind", ["fields", "preconditions", "resource"])
def test_no_status_outgrows_what_trailers_can_hold(filler: str, kind: str) -> None:
    long = filler * 5000
    error: errors.ServiceError
    if kind == "fields":
        error = errors.InvalidArgumentError([errors.FieldViolation(f"f[{index}]", long) for index in range(500)])
    elif kind == "preconditions":
        error = errors.PreconditionError(long, [errors.PreconditionViolation("K", long, long)] * 500, metadata={"m": long})
    else:
        error = errors.NotFoundError("t", long)
    status = rpc_status(error)
    percent_encoded = sum(1 if " " <= char <= "~" else 3 * len(char.encode()) for char in status.message)
    assert percent_encoded + len(status.details) * 4 / 3 < 8000
    found = details_of(error)
    if kind == "fields":
        listed = found["BadRequest"].field_violations
        assert 1 < len(listed) < 500
        assert "not listed" in listed[-1].description


def test_retry_info_has_the_delay() -> None:
    info = details_of(errors.UnavailableError("away", retry_after_s=2.5))["RetryInfo"]
    assert (info.retry_delay.seconds, info.retry_delay.nanos) == (2, 500_000_000)
