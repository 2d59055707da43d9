"""Gathers what the next report of a session will say. Knows the report's rules; nothing of how its facts come about."""

from collections.abc import Iterable

from protos.planes import (
    AdapterEvent,
    AdapterReady,
    EngineFinishReason,
    EngineState,
    FinishedRequest,
    PoolCounts,
    StepLogprobs,
    StepReport,
    StepTiming,
)


class ReportDraft:
    """One draft lives as long as a session and numbers its reports; `take` empties it."""

    def __init__(self, state: EngineState | None = None) -> None:
        """state: what the session's first report answers hello with."""
        self._sequence = 0
        self._applied_update = 0
        self._starved: tuple[int, ...] = ()
        self._state = state
        self._is_changed = state is not None
        self._clear()

    @property
    def has_news(self) -> bool:
        """Whether there is something to say even without a step."""
        return self._is_changed or bool(self._token_ids)

    def applied_update(self, sequence: int) -> None:
        """An update was taken in."""
        self._applied_update = sequence
        self._is_changed = True

    def add_token(self, request_key: int, token_id: int, logprobs: StepLogprobs | None) -> None:
        """A token was sampled."""
        self._request_keys.append(request_key)
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs[request_key] = logprobs

    def finish(self, request_key: int, reason: EngineFinishReason, error: str = "") -> None:
        """A request ended by itself."""
        self._finished.append(FinishedRequest(request_key, reason, error))
        self._is_changed = True

    def starve(self, request_keys: tuple[int, ...]) -> None:
        """Who was left out for want of a page. News only when it is not who it was: a stalled engine says it once."""
        self._is_changed |= request_keys != self._starved
        self._starved = request_keys

    def adapter_ready(self, request_key: int, wait_s: float) -> None:
        """A request's adapter is on the device."""
        self._ready.append(AdapterReady(request_key, wait_s))
        self._is_changed = True

    def add_events(self, events: Iterable[AdapterEvent]) -> None:
        """Adapters changed place; of several changes of one adapter the last counts."""
        for event in events:
            self._events.pop(event.digest, None)
            self._events[event.digest] = event
            self._is_changed = True

    def take(self, pool: PoolCounts, timing: StepTiming) -> StepReport:
        """The report; the draft is empty after it."""
        self._sequence += 1
        report = StepReport(
            sequence=self._sequence,
            applied_update=self._applied_update,
            request_keys=tuple(self._request_keys),
            token_ids=tuple(self._token_ids),
            logprobs=self._logprobs,
            finished=tuple(self._finished),
            starved=self._starved,
            adapter_events=tuple(self._events.values()),
            adapter_ready=tuple(self._ready),
            pool=pool,
            timing=timing,
            state=self._state,
        )
        self._clear()
        self._state = None
        self._is_changed = False
        return report

    def _clear(self) -> None:
        self._request_keys: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: dict[int, StepLogprobs] = {}
        self._finished: list[FinishedRequest] = []
        self._events: dict[str, AdapterEvent] = {}
        self._ready: list[AdapterReady] = []
