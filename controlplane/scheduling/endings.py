"""The ways a request can end other than by its tokens, in the words that its client gets to read."""

from controlplane.errors import (
    AbortedError,
    DataLossError,
    DeadlineError,
    InternalError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)
from controlplane.messages import DoesNotFit, FinishReason
from controlplane.scheduling.request import Request
from protos.planes import EngineFinishReason, FinishedRequest

_REASONS = {
    EngineFinishReason.EOS: FinishReason.EOS,
    EngineFinishReason.STOP_TOKEN: FinishReason.STOP_TOKEN,
    EngineFinishReason.LENGTH: FinishReason.LENGTH,
}


def of_engine(finished: FinishedRequest, request: Request) -> tuple[FinishReason, ServiceError | None]:
    """Why the data plane ended a request."""
    reason = _REASONS.get(finished.reason)
    if reason is not None:
        return reason, None
    if finished.reason is EngineFinishReason.ADAPTER_FAILED:
        name = request.spec.adapter.name if request.spec.adapter is not None else ""
        message = f"adapter {name!r} cannot be used: {finished.error}"
        metadata = {"adapter": name, "found": finished.error}
        return FinishReason.ERROR, DataLossError(message, reason="ADAPTER_LOAD_FAILED", metadata=metadata)
    request_id = request.spec.request_id
    return FinishReason.ERROR, InternalError(
        f"the data plane refused request {request_id!r}; its log says why", reason="REJECTED", metadata={"id": request_id}
    )


def too_late(request: Request, now: float) -> ServiceError:
    """A deadline has passed: that of the call, or else that of the first token."""
    deadline = request.spec.deadline
    if deadline is not None and deadline <= now:
        return DeadlineError(f"the deadline passed after {len(request.output_token_ids)} output tokens")
    return AbortedError(
        "the first token could not come within ttft_slo; retry later or allow more time",
        reason="SLO_EARLY_ABORT",
        retry_after_s=1.0,
    )


def adapter_removed(request: Request) -> ServiceError:
    """Its adapter was unregistered with force."""
    name = request.spec.adapter.name if request.spec.adapter is not None else ""
    return AbortedError(f"adapter {name!r} was unregistered", reason="ADAPTER_REMOVED", metadata={"adapter": name})


def never_fits(request: Request, shortfall: DoesNotFit) -> ServiceError:
    """It fitted when it came, but pins or data planes have changed since."""
    needed = shortfall.kv_pages + shortfall.adapter_pages
    return ResourceExhaustedError(
        f"request {request.spec.request_id!r} needs {needed} pages at its longest ({shortfall.kv_pages} for KV, "
        f"{shortfall.adapter_pages} for its adapter), but at most {shortfall.available_pages} are not pinned; "
        "lower max_tokens or unpin adapters",
        subject="pool_pages",
        reason="DOES_NOT_FIT",
        metadata={"needed_pages": str(needed), "available_pages": str(shortfall.available_pages)},
    )


def no_progress(request: Request, what: str) -> ServiceError:
    """It was put back too often without a new token in between."""
    return UnavailableError(
        f"request {request.spec.request_id!r} was given up after {request.num_fruitless} attempts without a token: {what}",
        reason="NO_PROGRESS",
    )
