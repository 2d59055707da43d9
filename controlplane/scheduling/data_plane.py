"""What the scheduler knows of one connected data plane: its ledger, its running requests, its adapters, and the update that
is being made up for it. Knows nothing of the other data planes or of the waiting queue.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from controlplane.messages import DataPlaneDescription
from controlplane.scheduling.idle_prefetch import IdlePrefetch
from controlplane.scheduling.ledger import Ledger
from controlplane.scheduling.request import Request
from protos.planes import (
    AdapterEvent,
    AdapterPlace,
    AdmittedRequest,
    BatchUpdate,
    EngineState,
    PoolCounts,
    StepReport,
    StepTiming,
)

# Token ids of all requests admitted by one update; keeps an update below gRPC's default message limit of 4 MiB.
MAX_UPDATE_TOKENS = 1 << 19


@dataclass(slots=True)
class _PendingUpdate:
    """Changes that have not been sent."""

    abort: list[int] = field(default_factory=list)
    admit: list[AdmittedRequest] = field(default_factory=list)
    prefetch: tuple[str, ...] | None = None
    pinned: tuple[str, ...] | None = None


class DataPlane:
    """One session with one data plane, as the scheduler sees it; made anew for every session."""

    def __init__(self, address: str, description: DataPlaneDescription, state: EngineState) -> None:
        self.address = address
        self.description = description
        self.ledger = Ledger(description.num_pages, description.geometry.page_tokens)
        cached_pages = description.host_cache_bytes // description.geometry.page_bytes or description.num_pages
        self.max_prefetch_pages = max(1, cached_pages // 2)
        self.running: dict[int, Request] = {}
        self.adapters: dict[str, AdapterEvent] = {event.digest: event for event in state.adapters}
        self.idle_prefetch = IdlePrefetch(description.num_pages)
        self.adapter_last_used: dict[str, float] = {}
        self.pool = PoolCounts(free_pages=description.num_pages)
        self.timing = StepTiming()
        self.last_step_s = 0.0  # reports between steps have no duration
        self.total_step_s = 0.0
        self.num_preemptions = 0
        self.is_starved = False
        self.held_until = 0.0  # nobody is admitted before, see hold()
        self._pending = _PendingUpdate(abort=list(state.held_request_keys))
        self._next_sequence = 1
        self._applied = 0
        # Requests of an earlier session take pages that the ledger does not know until the first update has aborted them.
        self._clean_at = 1 if state.held_request_keys else 0
        # The last update that freed pages: starvation reported before it was applied says nothing.
        self._last_abort_sequence = self._clean_at
        self._unapplied: deque[tuple[int, int]] = deque()  # (sequence, request_key) of admissions of the base model
        # What was sent last. None at first: the data plane may still follow the lists of an earlier session.
        self._prefetch: tuple[str, ...] | None = None
        self._pinned: tuple[str, ...] | None = None

    def has_place(self, now: float) -> bool:
        """Whether one more request may join the batch. Not before the requests of an earlier session are gone."""
        return (
            self._applied >= self._clean_at
            and now >= self.held_until
            and self.ledger.num_requests < self.description.max_num_seqs
        )

    @property
    def load(self) -> float:
        """How full it is, 0 to 1: the scarcer of places and pages."""
        return max(len(self.running) / self.description.max_num_seqs, self.ledger.used_pages / self.description.num_pages)

    def place(self, digest: str) -> AdapterPlace:
        """Where that adapter lies here."""
        event = self.adapters.get(digest)
        return event.place if event is not None else AdapterPlace.NONE

    def offer(self, digest: str, num_pages: int) -> None:
        """An adapter may be brought here while there are pages to spare."""
        if self.place(digest) is not AdapterPlace.DEVICE:
            self.idle_prefetch.add(digest, num_pages)

    def can_admit(self, request: Request) -> bool:
        """Whether the request's pages fit now."""
        return self.ledger.can_admit(request.num_tokens, request.max_num_tokens, request.spec.adapter)

    def is_needed_by(self, requests: Iterable[Request]) -> bool:
        """Whether one of these requests could run here if others made room."""
        return any(self.ledger.can_ever_admit(request.max_num_tokens, request.spec.adapter) for request in requests)

    def admit(self, request: Request, request_key: int, now: float) -> None:
        """Adds a waiting request to the running batch."""
        self.ledger.charge(request_key, request.num_tokens, request.max_num_tokens, request.spec.adapter)
        self._pending.admit.append(request.admit(request_key, self.address, now))
        self.running[request_key] = request
        if request.spec.adapter is not None:
            self.adapter_last_used[request.adapter_digest] = now
        elif not request.is_started:
            self._unapplied.append((self._next_sequence, request_key))

    def abort(self, request: Request) -> None:
        """Takes a request out of the running batch; its pages stay booked until the data plane has heard of it."""
        # An update is applied abort first, then admit: a request cannot be admitted and aborted by the same one.
        assert not self._pending.admit, "admissions must be sent before anything is aborted"
        del self.running[request.request_key]
        self.ledger.release_when_applied(request.request_key, self._next_sequence)
        self._pending.abort.append(request.request_key)
        self._last_abort_sequence = self._next_sequence

    def hold(self, until: float) -> None:
        """Admits nobody before that time, nor before the last abort has been applied: its pool has less than the ledger says."""
        self._clean_at = self._last_abort_sequence
        self.held_until = until

    def finish(self, request_key: int) -> None:
        """Takes a request that the data plane ended out of the running batch."""
        self.running.pop(request_key, None)
        self.ledger.release(request_key)

    def take_report(self, report: StepReport, pinned: Sequence[str]) -> list[Request]:
        """Books what a report says of pages and adapters; returns the base-model requests that now are known to run."""
        self._applied = report.applied_update
        self.ledger.applied(report.applied_update)
        self.pool, self.timing = report.pool, report.timing
        self.last_step_s = report.timing.duration_s or self.last_step_s
        self.total_step_s += report.timing.duration_s
        self.is_starved = bool(report.starved) and report.applied_update >= self._last_abort_sequence
        for event in report.adapter_events:
            self._take_adapter_event(event)
        if report.adapter_events and pinned:
            self.book_pinned(pinned)
        started = []
        while self._unapplied and self._unapplied[0][0] <= report.applied_update:
            request = self.running.get(self._unapplied.popleft()[1])
            if request is not None and not request.is_started:
                started.append(request)
        return started

    def _take_adapter_event(self, event: AdapterEvent) -> None:
        self.idle_prefetch.settle(event)
        if event.place is AdapterPlace.NONE:
            self.adapters.pop(event.digest, None)
            self.adapter_last_used.pop(event.digest, None)
        else:
            self.adapters[event.digest] = event

    def book_pinned(self, pinned: Sequence[str]) -> None:
        """Books the pages of pinned adapters that lie on the device here."""
        on_device = {d: self.adapters[d].num_pages for d in pinned if self.place(d) is AdapterPlace.DEVICE}
        self.ledger.set_pinned(pinned, on_device)

    def set_lists(self, prefetch: tuple[str, ...], pinned: tuple[str, ...]) -> None:
        """What should be prefetched and pinned here; sent if it differs from what was sent last."""
        if prefetch != self._prefetch:
            self._prefetch = self._pending.prefetch = prefetch
        if pinned != self._pinned:
            self._pinned = self._pending.pinned = pinned
            self.book_pinned(pinned)

    def take_updates(self) -> list[BatchUpdate]:
        """The changes since the last call, mostly one update, none if nothing changed."""
        pending, self._pending = self._pending, _PendingUpdate()
        updates: list[BatchUpdate] = []
        admits = split_by_tokens(pending.admit, MAX_UPDATE_TOKENS)
        if pending.abort or admits or pending.prefetch is not None or pending.pinned is not None:
            first = tuple(admits[0]) if admits else ()
            updates.append(self._number(BatchUpdate(0, tuple(pending.abort), first, pending.prefetch, pending.pinned)))
        updates.extend(self._number(BatchUpdate(0, admit=tuple(rest))) for rest in admits[1:])
        return updates

    def _number(self, update: BatchUpdate) -> BatchUpdate:
        numbered = BatchUpdate(self._next_sequence, update.abort, update.admit, update.prefetch, update.pinned)
        self._next_sequence += 1
        return numbered


def split_by_tokens(admits: Sequence[AdmittedRequest], max_tokens: int) -> list[list[AdmittedRequest]]:
    """Splits admissions, in order, into groups of at most so many token ids; a longer request is a group of its own."""
    groups: list[list[AdmittedRequest]] = []
    room = 0
    for admitted in admits:
        if not groups or len(admitted.token_ids) > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(admitted)
        room -= len(admitted.token_ids)
    return groups
