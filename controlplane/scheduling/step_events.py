"""What one report means for requests: the scheduler's answer to it, to be handed to their owners in the order of the lists."""

from dataclasses import dataclass, field
from typing import NamedTuple

from controlplane.messages import RequestOutcome
from controlplane.scheduling.request import Request
from protos.planes import StepLogprobs


class SampledToken(NamedTuple):
    """One new token of a request."""

    request: Request
    token_id: int
    logprobs: StepLogprobs | None


class EndedRequest(NamedTuple):
    """A request that ended, and how."""

    request: Request
    outcome: RequestOutcome


@dataclass(slots=True)
class StepEvents:
    """Requests that started, then tokens, then requests that ended. A request may be in all three."""

    started: list[Request] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    ended: list[EndedRequest] = field(default_factory=list)
