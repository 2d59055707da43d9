"""The engine: the standing set of requests and the loop that computes it, step after step, in one thread.

Everything else sends it messages (inbox.py). It knows token ids, pages and digests; no text, no tenant, no tensor.
Longer than most files here: what one turn does, and in which order, should be read in one place.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from dataplane.engine.admission import EngineLimits, refusal
from dataplane.engine.inbox import (
    AdapterFetched,
    HostImageEvicted,
    Inbox,
    Message,
    ReportSink,
    RoomForReports,
    SessionEnd,
    SessionLost,
    SessionOpened,
    Shutdown,
    UpdateReceived,
)
from dataplane.engine.model_runner import LaunchedStep, ModelRunner
from dataplane.engine.report_draft import ReportDraft
from dataplane.engine.request_state import RequestState
from dataplane.engine.step_packer import PackedStep, StepPacker
from dataplane.memory.page_pool import PageKind, PagePool
from dataplane.memory.residency import Residency
from dataplane.runner.sampling_row import SampledToken
from protos.planes import AdmittedRequest, BatchUpdate, EngineFinishReason, EngineState, PoolCounts, StepTiming

_log = logging.getLogger(__name__)

# How long nothing must arrive before the books are checked: that takes milliseconds, which the next request should not wait.
IDLE_CHECK_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class StepOnItsWay:
    """A step that was launched and whose tokens have not been taken in."""

    packed: PackedStep
    launched: LaunchedStep
    started_at: float


class Engine:
    """Owns the standing set, in the order of admission. All methods but `stop` belong to the engine's thread.

    With a runner that runs ahead, a step is packed and launched while the one before it computes: what a request's last token
    was is then not known yet, and one token too many may be computed of a request that this token ends; it is thrown away.
    """

    def __init__(
        self,
        inbox: Inbox,
        runner: ModelRunner,
        pool: PagePool,
        residency: Residency,
        limits: EngineLimits,
        epoch: int,
        orphan_grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """orphan_grace_s: how long requests are held after their session broke."""
        self._inbox = inbox
        self._runner = runner
        self._pool = pool
        self._residency = residency
        self._limits = limits
        self._epoch = epoch
        self._orphan_grace_s = orphan_grace_s
        self._clock = clock
        self._packer = StepPacker(pool, residency, limits.page_tokens, limits.token_budget)
        self._standing: dict[int, RequestState] = {}
        self._session: ReportSink | None = None
        # Held requests wait for the session's first update: it says which of them still stand for anything.
        self._awaits_update = True
        self._draft = ReportDraft()
        self._orphaned_at: float | None = None
        self._num_steps = 0
        self._on_its_way: StepOnItsWay | None = None
        self._last_taken_in_at = 0.0
        self._is_stopping = False
        # Nothing can change before the next message: the last turn had no request to compute, or room for none.
        self._is_stalled = True
        self._is_checked = False

    @property
    def num_running(self) -> int:
        """Requests in the standing set."""
        return len(self._standing)

    def run(self, on_failure: Callable[[], None]) -> None:
        """The thread's body: turns until Shutdown. An exception ends the service of this process, it is never passed over."""
        try:
            while self.turn():
                pass
        except Exception:
            _log.exception("engine failed steps=%d running=%d", self._num_steps, len(self._standing))
            if self._session is not None:
                self._session.close(SessionEnd.ENGINE_FAILED)
            on_failure()

    def stop(self) -> None:
        """Asks the thread to end, from any thread."""
        self._inbox.put(Shutdown())

    def turn(self, may_wait: bool = True) -> bool:
        """Takes in what arrived, computes one step if there is one, reports. Returns False when the engine has ended."""
        has_waited = self._is_stalled
        messages = self._inbox.take(self._wait_s() if may_wait else 0)
        for message in messages:
            self._handle(message)
        if self._is_stopping:
            self._end()
            return False
        self._drop_orphans()
        self._is_stalled = not self._step()
        self._report_between_steps()
        if has_waited and self._is_stalled and not messages:
            self._check_when_idle()
        return True

    def check_integrity(self) -> None:
        """Asserts that pool, adapters and standing set agree to the last page."""
        self._pool.check_integrity()
        self._residency.check_integrity()
        held = sum(request.num_pages for request in self._standing.values())
        num_kv = self._pool.num_held(PageKind.KV)
        assert held == num_kv, f"page tables name {held} pages, the pool counts {num_kv} of KV"

    def _wait_s(self) -> float | None:
        """How long to wait for a message: not at all while there is work, else until something is due, else without limit."""
        if not self._is_stalled:
            return 0
        waits = [] if self._is_checked else [IDLE_CHECK_AFTER_S]
        if self._orphaned_at is not None:
            waits.append(max(0.0, self._orphaned_at + self._orphan_grace_s - self._clock()))
        return min(waits, default=None)

    def _handle(self, message: Message) -> None:
        match message:
            case SessionOpened(session):
                self._open_session(session)
            case UpdateReceived(session, update):
                if session is self._session:
                    self._apply(update)
                session.update_applied()
            case SessionLost(session):
                if session is self._session:
                    self._lose_session()
            case AdapterFetched(digest, result):
                self._complete_fetch(digest, self._residency.complete_fetch(digest, result))
            case HostImageEvicted(digest):
                self._residency.complete_host_eviction(digest)
            case RoomForReports():
                pass
            case Shutdown():
                self._is_stopping = True

    def _open_session(self, session: ReportSink) -> None:
        self._take_in_launched()  # its tokens belong to the session that is over
        if self._session is not None:
            self._session.close(SessionEnd.TAKEN_OVER)
        _log.info("session opened session=%s held=%d", session.session_id, len(self._standing))
        self._session = session
        self._awaits_update = True
        self._orphaned_at = None
        self._residency.take_events()
        self._draft = ReportDraft(EngineState(self._epoch, tuple(self._standing), self._residency.snapshot()))

    def _lose_session(self) -> None:
        _log.info("session lost held=%d grace_s=%g", len(self._standing), self._orphan_grace_s)
        self._session = None
        self._orphaned_at = self._clock()

    def _apply(self, update: BatchUpdate) -> None:
        self._awaits_update = False
        self._is_checked = False
        for key in update.abort:
            if key in self._standing:
                self._drop(self._standing[key])
        for admitted in update.admit:
            self._admit(admitted)
        if update.prefetch is not None:
            self._residency.set_prefetch(update.prefetch)
        if update.pinned is not None:
            self._residency.set_pinned(update.pinned)
        self._draft.applied_update(update.sequence)

    def _admit(self, admitted: AdmittedRequest) -> None:
        key = admitted.request_key
        error = refusal(admitted, self._limits, self._standing, len(self._standing))
        if error is not None:
            _log.error("admission refused request=%s key=%d error=%s", admitted.request_id, key, error)
            if key in self._standing:
                # One key cannot stand for two requests: what is reported of it from here on would be ambiguous.
                self._drop(self._standing[key])
            self._draft.finish(key, EngineFinishReason.REJECTED, error)
            return
        self._standing[key] = RequestState(admitted, self._clock(), self._limits.max_model_len)
        if admitted.adapter_digest:
            self._residency.acquire(admitted.adapter_digest)

    def _complete_fetch(self, digest: str, error: str | None) -> None:
        """Ends the requests of an adapter that could not be loaded."""
        if error is None:
            return
        _log.warning("adapter failed digest=%s error=%s", digest, error)
        for request in [r for r in self._standing.values() if r.adapter_digest == digest]:
            self._finish(request, EngineFinishReason.ADAPTER_FAILED, error)

    def _step(self) -> bool:
        """Launches one step, if the session can take its report, and takes in the one before. Returns whether another turn may
        follow without a message."""
        self._residency.poll_copies()
        if self._session is None or not self._session.has_room() or self._awaits_update:
            self._take_in_launched()
            return False
        started_at = self._clock()
        packed = self._pack(started_at)
        if packed.starved and self._take_in_launched():
            # Pages are short only if they still are when all is known that ends with the step on its way: the control plane
            # preempts a request for who starves.
            packed = self._pack(started_at)
        self._draft.starve(packed.starved)
        # Before the model runs, so that these copies overlap it. One page for each request stays free: its next.
        self._residency.advance_prefetch(num_reserved_pages=len(self._standing))
        if not packed.chunks:
            return self._take_in_launched() or self._residency.wait_for_copy()
        launched = self._runner.launch(packed.chunks)
        for chunk in packed.chunks:
            chunk.request.launch(chunk.num_scheduled_tokens)
        if self._runner.runs_ahead:
            self._take_in_launched()  # the step before, while this one computes
        self._on_its_way = StepOnItsWay(packed, launched, started_at)
        if not self._runner.runs_ahead:
            self._take_in_launched()
        return True

    def _pack(self, now: float) -> PackedStep:
        packed = self._packer.pack(self._standing.values())
        for request in packed.ready:
            wait_s = now - request.admitted_at if request.has_waited_for_adapter else 0.0
            self._draft.adapter_ready(request.request_key, wait_s)
        return packed

    def _take_in_launched(self) -> bool:
        """Waits for the step on its way, books what it chose and reports it. Returns whether there was one."""
        step, self._on_its_way = self._on_its_way, None
        if step is None:
            return False
        sampled = iter(step.launched.wait())
        for chunk in step.packed.chunks:
            if not chunk.is_last:
                continue
            token, request = next(sampled), chunk.request
            # Not one that was aborted or ended while this step was on its way, nor its successor under the same key.
            if self._standing.get(request.request_key) is request:
                self._take_token(request, token)
        self._num_steps += 1
        now = self._clock()
        # A step begins when it is launched, or when the device is done with the one before.
        duration_s = now - max(step.started_at, self._last_taken_in_at)
        self._last_taken_in_at = now
        self._report(StepTiming(self._num_steps, duration_s, step.packed.num_prefill_tokens, step.packed.num_decode_tokens))
        return True

    def _take_token(self, request: RequestState, sampled: SampledToken) -> None:
        if sampled.token_id is None:
            reason = EngineFinishReason.ADAPTER_FAILED if request.adapter_digest else EngineFinishReason.REJECTED
            place = f"position {len(request.token_ids)}"
            self._finish(request, reason, f"no token can be chosen at {place}: no logit is finite there, or one is NaN")
            return
        request.append(sampled.token_id)
        self._draft.add_token(request.request_key, sampled.token_id, sampled.logprobs)
        reason_or_none = request.finish_reason(self._limits.eos_token_ids)
        if reason_or_none is not None:
            self._finish(request, reason_or_none)

    def _finish(self, request: RequestState, reason: EngineFinishReason, error: str = "") -> None:
        self._draft.finish(request.request_key, reason, error)
        self._drop(request)

    def _drop(self, request: RequestState) -> None:
        """Takes a request out of the standing set and frees what it holds."""
        del self._standing[request.request_key]
        # A step on its way may still read and write them; whatever comes to lie there is written behind it.
        self._pool.free(request.page_table.tolist(), request.owner)
        if request.adapter_digest:
            self._residency.release(request.adapter_digest)

    def _report_between_steps(self) -> None:
        """Reports what changed without a step: the control plane's ledger must learn of it."""
        self._draft.add_events(self._residency.take_events())
        if self._draft.has_news:
            self._report(StepTiming(self._num_steps))

    def _report(self, timing: StepTiming) -> None:
        if self._session is None or not self._session.has_room():
            return
        self._draft.add_events(self._residency.take_events())
        self._session.send(self._draft.take(self._pool_counts(), timing))
        self._is_checked = False

    def _pool_counts(self) -> PoolCounts:
        return PoolCounts(
            kv_pages=self._pool.num_held(PageKind.KV),
            adapter_pages=self._pool.num_held(PageKind.ADAPTER),
            idle_adapter_pages=self._residency.num_idle_pages,
            free_pages=self._pool.num_free,
        )

    def _drop_orphans(self) -> None:
        """Frees everything that a session left behind and nobody claimed within the grace period."""
        if self._orphaned_at is None or self._clock() < self._orphaned_at + self._orphan_grace_s:
            return
        if self._standing:
            _log.warning("orphans dropped requests=%d", len(self._standing))
        self._orphaned_at = None
        self._drop_all()

    def _drop_all(self) -> None:
        for request in list(self._standing.values()):
            self._drop(request)
        self._residency.set_prefetch(())
        self._residency.set_pinned(())

    def _end(self) -> None:
        self._take_in_launched()
        if self._session is not None:
            self._session.close(SessionEnd.SHUTTING_DOWN)
            self._session = None
        self._drop_all()
        self.check_integrity()

    def _check_when_idle(self) -> None:
        if not self._is_checked:
            self.check_integrity()
            self._is_checked = True
