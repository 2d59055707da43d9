"""A request as the scheduler sees it: what was asked for, what came out so far, and where it stands.

Knows nothing of data planes but the address of the one that runs it.
"""

from dataclasses import dataclass, field
from enum import Enum

from controlplane.errors import ServiceError
from controlplane.messages import FinishReason, RequestOutcome, RequestSpec
from protos.planes import AdmittedRequest


class RequestState(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


# RUNNING to WAITING is a preemption, or the loss of the data plane.
ALLOWED_MOVES = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset[RequestState](),
}


@dataclass(slots=True, eq=False)
class Request:
    """One request from submission to end. `arrival` numbers requests in the order in which they were submitted.

    request_key: names the current admission on the wire; 0 while waiting.
    has_run: it was admitted before.
    is_started: its owner was told that it runs.
    overtaken: how often a request ranked behind this one was admitted while this one waited and did not fit.
    num_fruitless: admissions in a row that ended without a new token, by no choice of the policy.
    """

    spec: RequestSpec
    arrival: int
    waiting_since: float
    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    request_key: int = 0
    address: str = ""
    has_run: bool = False
    is_started: bool = False
    overtaken: int = 0
    num_fruitless: int = 0
    num_preemptions: int = 0
    queue_s: float = 0.0
    adapter_wait_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.spec.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_num_tokens(self) -> int:
        """Prompt and output at its longest."""
        return len(self.spec.prompt_token_ids) + self.spec.sampling.max_tokens

    @property
    def adapter_digest(self) -> str:
        """Content digest of its adapter; empty for the base model."""
        return self.spec.adapter.digest if self.spec.adapter is not None else ""

    @property
    def next_deadline(self) -> float | None:
        """When it must be given up if nothing happens before: `ttft_deadline` counts until the first token."""
        deadline, ttft_deadline = self.spec.deadline, self.spec.ttft_deadline
        if ttft_deadline is None or self.output_token_ids:
            return deadline
        return ttft_deadline if deadline is None else min(deadline, ttft_deadline)

    def move(self, state: RequestState) -> None:
        """Changes the state; a move outside the table is a bug of ours."""
        assert state in ALLOWED_MOVES[self.state], f"request {self.spec.request_id}: {self.state.name} to {state.name}"
        self.state = state

    def admit(self, request_key: int, address: str, now: float) -> AdmittedRequest:
        """Moves to RUNNING and returns the request in full, as it goes to the data plane."""
        self.move(RequestState.RUNNING)
        self.request_key, self.address, self.has_run = request_key, address, True
        self.queue_s += now - self.waiting_since
        return AdmittedRequest(
            request_key=request_key,
            request_id=self.spec.request_id,
            token_ids=(*self.spec.prompt_token_ids, *self.output_token_ids),
            num_output_tokens=len(self.output_token_ids),
            adapter_digest=self.adapter_digest,
            sampling=self.spec.sampling,
        )

    def requeue(self, now: float) -> None:
        """Moves back to WAITING with prompt and output so far."""
        self.move(RequestState.WAITING)
        self.request_key, self.address, self.waiting_since = 0, "", now

    def finish(self, reason: FinishReason, now: float, error: ServiceError | None = None) -> RequestOutcome:
        """Moves to FINISHED and returns how it ended."""
        if self.state is RequestState.WAITING:
            self.queue_s += now - self.waiting_since
        self.move(RequestState.FINISHED)
        return RequestOutcome(reason, error, self.queue_s, self.adapter_wait_s, self.num_preemptions)
