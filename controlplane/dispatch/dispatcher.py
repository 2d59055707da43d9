"""The dispatcher: takes requests in, drives the scheduler and the data plane sessions, and hands tokens to their sinks.

Owns the scheduler, one session per data plane, and the timer of deadlines. Knows nothing of text, adapters' names or clients.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from adapter_store.geometry import BaseGeometry
from controlplane.dispatch.data_plane_session import DataPlaneRefusedError, DataPlaneSession, SessionConfig
from controlplane.dispatch.load import adapter_residency, data_plane_load
from controlplane.dispatch.sinks import Sinks
from controlplane.dispatch.throughput import ThroughputMeter
from controlplane.dispatch.wakeup_timer import WakeupTimer
from controlplane.errors import InternalError, ServiceError, UnavailableError
from controlplane.messages import (
    AdapterResidency,
    DataPlaneDescription,
    DoesNotFit,
    DrainResult,
    FinishReason,
    LoadSnapshot,
    RequestSpec,
    TokenSink,
)
from controlplane.scheduling import EndedRequest, MakeScheduler, Request, RequestState, Scheduler, SchedulerConfig, StepEvents
from protos.planes import EngineState, StepReport

_log = logging.getLogger(__name__)

# A submitted request, to its submitter: good for Dispatcher.abort and nothing else.
RequestHandle = Request

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    """Bounds of the dispatcher. Requests wait `outage_grace_s` for a data plane that was lost, then it is forgotten.

    idle_prefetch: adapters that are offered are brought to data planes that have pages to spare.
    """

    max_waiting: int = 1024
    outage_grace_s: float = 60.0
    idle_prefetch: bool = True
    session: SessionConfig = field(default_factory=SessionConfig)


class Dispatcher:
    """Runs on one event loop. Only start, close, wait_connected and drain await; nothing here makes a task per token."""

    def __init__(
        self,
        addresses: Sequence[str],
        config: DispatcherConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_scheduler: MakeScheduler = Scheduler,
    ) -> None:
        """clock: must run as fast as the event loop's; deadlines are times on it. make_scheduler: another one, to compare."""
        self._config = config or DispatcherConfig()
        self._clock = clock
        self._scheduler = make_scheduler(SchedulerConfig(self._config.max_waiting, idle_prefetch=self._config.idle_prefetch))
        self._sessions = {a: DataPlaneSession(a, self, self._config.session) for a in dict.fromkeys(addresses)}
        self._sinks = Sinks()
        self._reference: DataPlaneDescription | None = None
        self._throughput = ThroughputMeter(clock())
        self._is_draining = False
        self._connected = asyncio.Event()
        self._connection_callbacks: list[Callable[[bool], None]] = []
        self._residency_callbacks: list[Callable[[str], None]] = []
        self._flush: asyncio.Handle | None = None
        self._timer = WakeupTimer(self._wake_up)
        self._outages = {a: WakeupTimer(partial(self._end_outage, a)) for a in self._sessions}

    async def start(self) -> None:
        """Opens the sessions; returns at once, they connect in the background."""
        for session in self._sessions.values():
            session.start()

    async def close(self) -> None:
        """Fails what is unfinished with UNAVAILABLE and closes the sessions."""
        self._is_draining = True
        self._fail_unfinished("the service has stopped", "STOPPED")
        await asyncio.gather(*(session.close() for session in self._sessions.values()))
        if self._flush is not None:
            self._flush.cancel()
        for timer in (self._timer, *self._outages.values()):
            timer.cancel()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Waits until a data plane is connected; False if none was in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            return False
        return True

    def on_connection_change(self, callback: Callable[[bool], None]) -> None:
        """Calls back with `is_connected` whenever that changes (health status)."""
        self._connection_callbacks.append(callback)

    def on_residency_change(self, callback: Callable[[str], None]) -> None:
        """Calls back with an adapter's digest whenever it changes place on some data plane."""
        self._residency_callbacks.append(callback)

    @property
    def is_connected(self) -> bool:
        """Whether at least one data plane is connected."""
        return bool(self._scheduler.connected)

    @property
    def is_draining(self) -> bool:
        """Whether drain() or close() was called."""
        return self._is_draining

    def geometry(self) -> BaseGeometry | None:
        """The base model's geometry; None until a data plane connected for the first time."""
        return self._reference.geometry if self._reference is not None else None

    def description(self) -> DataPlaneDescription | None:
        """The description all data planes agree on, with the smallest max_model_len; None until one connected."""
        if self._reference is None:
            return None
        known = (description.max_model_len for description in self._scheduler.known.values())
        return replace(self._reference, max_model_len=min(known, default=self._reference.max_model_len))

    def pool_pages(self) -> int:
        """Pages of the smallest known pool; 0 while no data plane is known."""
        return min((known.num_pages for known in self._scheduler.known.values()), default=0)

    def check_fits(self, spec: RequestSpec) -> DoesNotFit | None:
        """Why this request could never run on any known data plane, or None if it can."""
        return self._scheduler.check_fits(spec)

    def submit(self, spec: RequestSpec, sink: TokenSink) -> RequestHandle:
        """Queues a request.

        Raises:
            QueueFullError: max_waiting requests wait.
            UnavailableError: draining, or no data plane is connected.
        """
        if self._is_draining:
            raise UnavailableError("the service is draining; send the request elsewhere or later", reason="DRAINING")
        self._require_connected()
        request = self._scheduler.add(spec, self._clock())
        self._sinks.add(request, sink)
        self._schedule_soon()
        return request

    def abort(self, handle: RequestHandle) -> None:
        """Drops a request; its sink is not called again. Does nothing if it has ended."""
        if self._scheduler.end(handle, FinishReason.ABORTED, self._clock()) is not None:
            self._sinks.forget(handle)
            self._schedule_soon()

    def abort_adapter(self, digest: str) -> int:
        """Fails every unfinished request of that adapter with ABORTED, reason ADAPTER_REMOVED; returns how many."""
        ended = self._scheduler.end_adapter(digest, self._clock())
        self._finish_all(ended)
        self._schedule_soon()
        return len(ended)

    def residency(self, digest: str) -> tuple[AdapterResidency, ...]:
        """Where that adapter lies, one entry per data plane that holds or fetches it or failed to."""
        return adapter_residency(digest, self._scheduler.connected, to_epoch_s=time.time() - self._clock())

    def set_pinned(self, digests: Sequence[str]) -> None:
        """Replaces the adapters that no data plane may evict."""
        self._scheduler.set_pinned(digests)
        self._schedule_soon()

    def preload(self, digest: str) -> None:
        """Asks every connected data plane to bring that adapter to its device.

        Raises:
            UnavailableError: no data plane is connected.
        """
        self._require_connected()
        self._scheduler.preload(digest)
        self._schedule_soon()

    def offer(self, digest: str, num_pages: int) -> None:
        """That adapter may be brought to data planes that have pages to spare."""
        self._scheduler.offer(digest, num_pages)
        self._schedule_soon()

    def withdraw(self, digest: str) -> None:
        """Takes an offer back; nothing if there was none."""
        self._scheduler.withdraw(digest)
        self._schedule_soon()

    def load(self) -> LoadSnapshot:
        """Queues, memory and throughput as of the latest reports."""
        scheduler = self._scheduler
        return LoadSnapshot(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            data_planes=tuple(data_plane_load(a, scheduler.known.get(a), scheduler.connected.get(a)) for a in self._sessions),
            output_tokens_per_s=self._throughput.rate(self._clock()),
            draining=self._is_draining,
        )

    async def drain(self, timeout_s: float) -> DrainResult:
        """Stops taking requests, waits for the unfinished ones, aborts what is left at the timeout."""
        self._is_draining = True
        num_unfinished = len(self._sinks)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._sinks.wait_idle()
        num_aborted = len(self._sinks)
        for request in self._scheduler.unfinished():
            if request.is_started:
                self._end(request, FinishReason.ABORTED)
        self._fail_unfinished("the service is draining; send the request elsewhere or later", "DRAINING")
        return DrainResult(num_finished=num_unfinished - num_aborted, num_aborted=num_aborted)

    # What the sessions tell (SessionListener).

    def on_described(self, address: str, description: DataPlaneDescription) -> None:
        """Refuses a data plane whose model is not that of the first one: a request must get the same answer from any."""
        ours = self._reference
        if ours is not None and _model(description) != _model(ours):
            raise DataPlaneRefusedError(f"it serves another model than the rest: {_model(description)}, not {_model(ours)}")

    def on_connected(self, address: str, description: DataPlaneDescription, state: EngineState) -> None:
        """Takes a data plane in."""
        self.on_described(address, description)  # another one may have connected in the meantime
        if self._reference is None:
            self._reference = description
        self._scheduler.data_plane_connected(address, description, state)
        self._outages[address].cancel()
        if not self._connected.is_set():
            self._connected.set()
            _notify(self._connection_callbacks, True)
        for event in state.adapters:
            _notify(self._residency_callbacks, event.digest)

    def on_reports(self, address: str, reports: Sequence[StepReport]) -> None:
        """Some steps: hands out their tokens, then decides who runs next."""
        now = self._clock()
        events = self._scheduler.update_from_reports(address, reports, now)
        self._throughput.add(sum(len(tokens.token_ids) for tokens in events.tokens), now)
        self._hand_out(events)
        self._schedule()
        for digest in dict.fromkeys(event.digest for report in reports for event in report.adapter_events):
            _notify(self._residency_callbacks, digest)

    def on_lost(self, address: str) -> None:
        """A data plane is away: its requests wait for it or for another one."""
        data_plane = self._scheduler.connected.get(address)
        lost_adapters = list(data_plane.adapters) if data_plane is not None else []
        self._finish_all(self._scheduler.data_plane_lost(address, self._clock()))
        now = self._clock()
        self._outages[address].set(now + self._config.outage_grace_s, now)
        if not self._scheduler.connected:
            self._connected.clear()
            _notify(self._connection_callbacks, False)
        for digest in lost_adapters:
            _notify(self._residency_callbacks, digest)
        self._schedule_soon()

    def _hand_out(self, events: StepEvents) -> None:
        for request in events.started:
            if self._sinks.start(request):
                self._scheduler.end(request, FinishReason.ERROR, self._clock())
        for request, token_ids, logprobs in events.tokens:
            reason = self._sinks.tokens(request, token_ids, logprobs)
            if reason is not None:
                self._stop(request, reason, events)
        self._finish_all(events.ended)

    def _stop(self, request: Request, reason: FinishReason, events: StepEvents) -> None:
        """Ends a request at its sink's wish. If the data plane has ended it meanwhile, the sink's reason counts."""
        if request.state is not RequestState.FINISHED:
            self._end(request, reason)
            return
        outcomes = [ended.outcome for ended in events.ended if ended.request is request]
        self._sinks.finish(EndedRequest(request, replace(outcomes[0], reason=reason, error=None)))

    def _end(self, request: Request, reason: FinishReason, error: ServiceError | None = None) -> None:
        ended = self._scheduler.end(request, reason, self._clock(), error)
        if ended is not None:
            self._sinks.finish(ended)

    def _finish_all(self, all_ended: Iterable[EndedRequest]) -> None:
        for ended in all_ended:
            if isinstance(ended.outcome.error, InternalError):
                _log.error("request failed request=%s error=%s", ended.request.spec.request_id, ended.outcome.error)
            self._sinks.finish(ended)

    def _fail_unfinished(self, message: str, reason: str) -> None:
        for request in self._scheduler.unfinished():
            self._end(request, FinishReason.ERROR, UnavailableError(message, reason=reason))
        self._schedule_soon()

    def _end_outage(self, address: str) -> None:
        """What only this data plane could run is given up; everything, if no other one is known."""
        _log.warning("data plane forgotten address=%s outage_grace_s=%g", address, self._config.outage_grace_s)
        self._scheduler.forget_data_plane(address)
        if not self._scheduler.known:
            message = f"no data plane came back within {self._config.outage_grace_s:g} s; retry later"
            self._fail_unfinished(message, "NO_DATA_PLANE")
        self._schedule_soon()

    def _require_connected(self) -> None:
        if not self._scheduler.connected:
            raise UnavailableError("no data plane is connected; retry later", reason="NO_DATA_PLANE")

    def _schedule_soon(self) -> None:
        """One schedule for everything that this turn of the event loop brings."""
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_soon(self._schedule)

    def _schedule(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        now = self._clock()
        schedule = self._scheduler.schedule(now)
        for address, update in schedule.updates:
            self._sessions[address].send(update)
        self._finish_all(schedule.ended)
        self._timer.set(self._scheduler.next_wakeup(now), now)

    def _wake_up(self) -> None:
        self._finish_all(self._scheduler.expire(self._clock()))
        self._schedule()


def _model(description: DataPlaneDescription) -> tuple[object, ...]:
    """What all data planes must agree on."""
    return (description.geometry, description.vocab_size, description.eos_token_ids)


def _notify(callbacks: Iterable[Callable[[T], None]], value: T) -> None:
    for callback in callbacks:
        callback(value)
