"""What a client plans to send and what became of it. Times are seconds since the start of the run. Knows no protocol."""

from dataclasses import dataclass, field

OK = "OK"
# The client's own deadline; named as gRPC does, whatever the protocol.
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request of a trace with the name of its adapter; empty is the base model. prompt_token_ids: None for a random prompt."""

    index: int
    at_s: float
    adapter: str
    input_tokens: int
    output_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ServerTimings:
    """What the service said of one request: where its time went."""

    queue_s: float
    adapter_wait_s: float
    num_preemptions: int


@dataclass(slots=True)
class Outcome:
    """What became of one request. Each message that brought tokens has its arrival and how many it brought."""

    request: PlannedRequest
    sent_s: float = 0.0
    finished_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    status: str = OK
    detail: str = ""
    server: ServerTimings | None = None

    @property
    def is_ok(self) -> bool:
        """Whether it came to its end without an error."""
        return self.status == OK

    @property
    def num_tokens(self) -> int:
        """Output tokens that arrived."""
        return sum(self.token_counts)

    @property
    def late_s(self) -> float:
        """How long after its planned time it was sent: the client's fault, and never the service's."""
        return self.sent_s - self.request.at_s

    @property
    def ttft_s(self) -> float | None:
        """From the planned time to the first token, so that a client that is late cannot make the service look fast."""
        return self.arrivals_s[0] - self.request.at_s if self.arrivals_s else None

    @property
    def e2e_s(self) -> float:
        """From the planned time to the end of the stream."""
        return self.finished_s - self.request.at_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of the tokens after the first message; None if all came in one."""
        num_later = self.num_tokens - self.token_counts[0] if self.token_counts else 0
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / num_later if num_later else None

    def itl_s(self) -> list[float]:
        """One gap per token after the first message, at arrival: a message of k tokens ends one wait, and k - 1 of nothing.

        A reader who waits for tokens sees just that. The percentiles keep the long waits that a mean over k would hide.
        """
        gaps: list[float] = []
        for before, now, count in zip(self.arrivals_s, self.arrivals_s[1:], self.token_counts[1:], strict=False):
            gaps += [now - before, *([0.0] * (count - 1))]
        return gaps
