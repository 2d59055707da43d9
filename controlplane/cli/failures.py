"""Says what went wrong to a person (or, with --json, to a program), and which exit code a failure has.

Exit codes: 0 done, 1 the service refused or failed, 2 wrong usage, 3 the service cannot be reached, 130 interrupted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status
from rich.text import Text

from controlplane.cli.output import Output, printable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """A command cannot go on; the message says why and what to do about it."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed call, with the details that the service attached to its status."""

    code: str
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    resource: str = ""
    retry_after_s: float | None = None

    @property
    def exit_code(self) -> int:
        """3 if nothing answered, 1 if the service did."""
        # Every error of the service carries an ErrorInfo; one without it was made by the client's own transport.
        return EXIT_UNREACHABLE if self.code == "UNAVAILABLE" and not self.reason else EXIT_FAILED


def failure_of(error: grpc.RpcError) -> Failure:
    """What a failed call says."""
    assert isinstance(error, grpc.Call), "a failed call of a stub is a Call"
    code, message = error.code().name, error.details() or ""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status: the status stands
        status = None
    return _with_details(code, message, status) if status else Failure(code, message)


def _with_details(code: str, message: str, status: status_pb2.Status) -> Failure:
    info, retry, resource = details_pb2.ErrorInfo(), details_pb2.RetryInfo(), details_pb2.ResourceInfo()
    bad, unmet, quota = details_pb2.BadRequest(), details_pb2.PreconditionFailure(), details_pb2.QuotaFailure()
    has_retry = False
    for detail in status.details:
        has_retry = detail.Unpack(retry) or has_retry
        for known in (info, resource, bad, unmet, quota):
            detail.Unpack(known)
    return Failure(
        code=code,
        message=message,
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=(
            *((violation.field, violation.description) for violation in bad.field_violations),
            *((violation.subject or violation.type, violation.description) for violation in unmet.violations),
            *((violation.subject, violation.description) for violation in quota.violations),
        ),
        resource=f"{resource.resource_type} {resource.resource_name}".strip(),
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
    )


def to_json(failure: Failure) -> dict[str, Any]:
    """A failure as a JSON document."""
    return {
        "error": {
            "code": failure.code,
            "message": failure.message,
            "reason": failure.reason,
            "metadata": dict(failure.metadata),
            "violations": [{"subject": subject, "description": text} for subject, text in failure.violations],
            "resource": failure.resource,
            "retry_after_s": failure.retry_after_s,
        }
    }


def report(failure: Failure, output: Output, server: str) -> None:
    """Writes a failure where people and programs look for it."""
    if output.as_json:
        output.json(to_json(failure))
        return
    if failure.exit_code == EXIT_UNREACHABLE:
        _error(output, f"cannot reach loraplane at {server}: {failure.message}")
        _line(output, "Is it running? Start it with: loraplane up --model DIRECTORY; or name another one: --server HOST:PORT")
        return
    reason = f" ({failure.reason})" if failure.reason else ""
    _error(output, f"{failure.code}{reason}: {failure.message}")
    for subject, description in failure.violations:
        # One violation is usually the message itself.
        if description not in failure.message or subject not in failure.message:
            _line(output, f"{subject}: {description}" if subject else description)
    for key, value in failure.metadata.items():
        if value not in failure.message:
            _line(output, f"{key}: {value}")
    if failure.retry_after_s is not None:
        _line(output, f"try again in {failure.retry_after_s:g} s")


def report_command_error(error: CommandError, output: Output) -> None:
    """Writes why a command gave up before or between calls."""
    if output.as_json:
        output.json(to_json(Failure("CLIENT", str(error))))
    else:
        _error(output, str(error))


def _error(output: Output, text: str) -> None:
    output.errors.print(Text.assemble(("error: ", "bold red"), printable(text)))


def _line(output: Output, text: str) -> None:
    output.errors.print(Text(f"  {printable(text)}"))
