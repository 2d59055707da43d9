"""What reports mean for requests: the scheduler's answer to them, to be handed to their owners in the order of the lists."""

from dataclasses import dataclass, field
from typing import NamedTuple

from controlplane.messages import RequestOutcome
from controlplane.scheduling.request import Request
from protos.planes import StepLogprobs


class SampledTokens(NamedTuple):
    """New tokens of a request, and one entry of logprobs for each if it asked for them."""

    request: Request
    token_ids: list[int]
    logprobs: list[StepLogprobs]


class EndedRequest(NamedTuple):
    """A request that ended, and how."""

    request: Request
    outcome: RequestOutcome


@dataclass(slots=True)
class StepEvents:
    """Requests that started, then tokens, then requests that ended. A request may be in all three."""

    started: list[Request] = field(default_factory=list)
    tokens: list[SampledTokens] = field(default_factory=list)
    ended: list[EndedRequest] = field(default_factory=list)
