"""The scheduler: the waiting queue, the running batches of all data planes, and every move of a request between them.

Pure logic: no I/O, no clock (time is passed in), no meaning of tokens. Single-threaded.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.errors import ServiceError
from controlplane.messages import DataPlaneDescription, DoesNotFit, FinishReason, RequestSpec
from controlplane.scheduling import endings
from controlplane.scheduling.data_plane import DataPlane
from controlplane.scheduling.deadlines import Deadlines
from controlplane.scheduling.placement import choose
from controlplane.scheduling.policy import FcfsPolicy
from controlplane.scheduling.prefetch import LOOKAHEAD, PreloadList, prefetch_lists
from controlplane.scheduling.request import Request, RequestState
from controlplane.scheduling.step_events import EndedRequest, SampledTokens, StepEvents
from controlplane.scheduling.waiting_queue import WaitingQueue
from protos.planes import BatchUpdate, EngineState, StepLogprobs, StepReport

# A request that found no page though it ran alone is tried again after this, doubled each time: pages of adapters that are
# being copied come free by themselves.
STARVED_HOLD_S = 0.05


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds. `max_fruitless`: how often a request is put back without a new token in between before it is given up.

    idle_prefetch: whether offered adapters are brought to data planes before a request asks for them.
    """

    max_waiting: int = 1024
    max_fruitless: int = 3
    idle_prefetch: bool = True


@dataclass(slots=True)
class Schedule:
    """What to send to which address, in order, and requests that were given up instead."""

    updates: list[tuple[str, BatchUpdate]] = field(default_factory=list)
    ended: list[EndedRequest] = field(default_factory=list)


class Scheduler:
    """Decides who runs where. Changes accumulate per data plane until schedule() hands them out as batch updates."""

    def __init__(self, config: SchedulerConfig | None = None, policy: FcfsPolicy | None = None) -> None:
        self._config = config or SchedulerConfig()
        self._policy = policy or FcfsPolicy()
        self._waiting = WaitingQueue(self._policy, self._config.max_waiting)
        self._deadlines = Deadlines()
        self._connected: dict[str, DataPlane] = {}
        self._known: dict[str, DataPlaneDescription] = {}
        self._pinned: tuple[str, ...] = ()
        self._preload = PreloadList()
        self._offered: dict[str, int] = {}  # digest: pages
        self._listed: object = None  # what the lists of adapters were last made of
        self._next_arrival = 1
        self._next_key = 1

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place in a batch."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in a batch, all data planes."""
        return sum(len(data_plane.running) for data_plane in self._connected.values())

    @property
    def connected(self) -> Mapping[str, DataPlane]:
        """The connected data planes by address."""
        return self._connected

    @property
    def known(self) -> Mapping[str, DataPlaneDescription]:
        """The latest description of every data plane that connected and was not forgotten."""
        return self._known

    def unfinished(self) -> list[Request]:
        """Every waiting and running request."""
        running = [request for data_plane in self._connected.values() for request in data_plane.running.values()]
        return self._waiting.all() + running

    def check_fits(self, spec: RequestSpec) -> DoesNotFit | None:
        """Why this request could never run on any known data plane, or None if it can or no data plane is known yet."""
        kv_pages, available = 0, -1
        adapter_pages, digest = (spec.adapter.num_pages, spec.adapter.digest) if spec.adapter is not None else (0, "")
        for address, description in self._known.items():
            data_plane = self._connected.get(address)
            pages = data_plane.ledger.available_pages(digest) if data_plane is not None else description.num_pages
            kv_pages = description.geometry.num_kv_pages(len(spec.prompt_token_ids) + spec.sampling.max_tokens)
            if kv_pages + adapter_pages <= pages:
                return None
            available = max(available, pages)
        return DoesNotFit(kv_pages, adapter_pages, available) if available >= 0 else None

    def add(self, spec: RequestSpec, now: float) -> Request:
        """Queues a request.

        Raises:
            QueueFullError: max_waiting requests wait.
        """
        request = Request(spec, self._next_arrival, now)
        self._waiting.add(request)
        self._next_arrival += 1
        self._deadlines.watch(request)
        return request

    def end(self, request: Request, reason: FinishReason, now: float, error: ServiceError | None = None) -> EndedRequest | None:
        """Ends a request wherever it stands; None if it has ended already."""
        if request.state is RequestState.FINISHED:
            return None
        if request.state is RequestState.WAITING:
            self._waiting.remove(request)
        else:
            self._connected[request.address].abort(request)
        return EndedRequest(request, request.finish(reason, now, error))

    def end_adapter(self, digest: str, now: float) -> list[EndedRequest]:
        """Ends every request of an adapter that was unregistered."""
        self._preload.discard(digest)
        users = [request for request in self.unfinished() if request.adapter_digest == digest]
        return self._fail_all([(request, endings.adapter_removed(request)) for request in users], now)

    def next_wakeup(self, now: float) -> float | None:
        """When expire() and schedule() should be called even if nothing happens before; None if never."""
        held = [data_plane.held_until for data_plane in self._connected.values() if data_plane.held_until > now]
        deadline = self._deadlines.next()
        return min(held if deadline is None else [deadline, *held], default=None)

    def expire(self, now: float) -> list[EndedRequest]:
        """Ends the requests, waiting or running, whose deadline has passed."""
        late = self._deadlines.take_expired(now)
        return self._fail_all([(request, endings.too_late(request, now)) for request in late], now)

    def set_pinned(self, digests: Sequence[str]) -> None:
        """Replaces the adapters that no data plane may evict."""
        self._pinned = tuple(dict.fromkeys(digests))
        self._listed = None

    def preload(self, digest: str) -> None:
        """Asks every connected data plane to bring an adapter to its device."""
        self._preload.add(digest)
        self._preload.settle(digest, self._connected.values())

    def offer(self, digest: str, num_pages: int) -> None:
        """An adapter may be brought to data planes that have pages to spare."""
        if self._config.idle_prefetch and digest not in self._offered:
            self._offered[digest] = num_pages
            for data_plane in self._connected.values():
                data_plane.offer(digest, num_pages)

    def withdraw(self, digest: str) -> None:
        """Takes an offer back; nothing if there was none."""
        if self._offered.pop(digest, None) is not None:
            for data_plane in self._connected.values():
                data_plane.idle_prefetch.discard(digest)

    def data_plane_connected(self, address: str, description: DataPlaneDescription, state: EngineState) -> None:
        """A session has opened. What the data plane still holds of an earlier one is aborted by the first update."""
        assert address not in self._connected, f"{address} is connected twice"
        self._known[address] = description
        self._connected[address] = DataPlane(address, description, state)
        self._next_key = max(self._next_key, 1 + max(state.held_request_keys, default=0))
        for digest, num_pages in self._offered.items():
            self._connected[address].offer(digest, num_pages)
        self._listed = None

    def data_plane_lost(self, address: str, now: float) -> list[EndedRequest]:
        """A session has ended: its requests wait again, at the front; those that got nowhere too often are given up."""
        data_plane = self._connected.pop(address, None)
        if data_plane is None:
            return []
        self._listed = None
        put_back = [self._put_back(request, now, is_fruitless=True) for request in data_plane.running.values()]
        return self._give_up_fruitless(put_back, "the data plane was lost each time", now)

    def forget_data_plane(self, address: str) -> None:
        """A lost data plane is not waited for any more."""
        assert address not in self._connected, f"{address} is connected"
        self._known.pop(address, None)

    def update_from_reports(self, address: str, reports: Sequence[StepReport], now: float) -> StepEvents:
        """Books what steps did, oldest first, and returns what they mean for requests."""
        data_plane = self._connected[address]
        events = StepEvents()
        for report in reports:
            for request in data_plane.take_report(report, self._pinned):
                self._start(request, events)
            for ready in report.adapter_ready:
                waiter = data_plane.running.get(ready.request_key)
                if waiter is not None:
                    waiter.adapter_wait_s += ready.wait_s
                    self._start(waiter, events)
        self._take_tokens(data_plane, reports, events)
        for finished in (finished for report in reports for finished in report.finished):
            ended = data_plane.running.get(finished.request_key)
            data_plane.finish(finished.request_key)
            if ended is not None:
                reason, error = endings.of_engine(finished, ended)
                events.ended.append(EndedRequest(ended, ended.finish(reason, now, error)))
        for event in (event for report in reports for event in report.adapter_events):
            self._preload.settle(event.digest, self._connected.values())
        return events

    def schedule(self, now: float) -> Schedule:
        """Preempts where pages run short, admits who fits, and hands out every change since the last call."""
        schedule = Schedule()
        for data_plane in self._connected.values():
            schedule.ended += self._preempt(data_plane, now)
        schedule.ended += self._admit(now)
        self._list_adapters()
        for address, data_plane in self._connected.items():
            schedule.updates += [(address, update) for update in data_plane.take_updates()]
        return schedule

    def _start(self, request: Request, events: StepEvents) -> None:
        if not request.is_started:
            request.is_started = True
            events.started.append(request)

    def _take_tokens(self, data_plane: DataPlane, reports: Sequence[StepReport], events: StepEvents) -> None:
        tokens: defaultdict[int, list[int]] = defaultdict(list)
        logprobs: defaultdict[int, list[StepLogprobs]] = defaultdict(list)
        for report in reports:
            for key, token_id in zip(report.request_keys, report.token_ids, strict=True):
                tokens[key].append(token_id)
            for key, entry in report.logprobs.items():
                logprobs[key].append(entry)
        for key, token_ids in tokens.items():
            data_plane.ledger.grow(key, len(token_ids))
            request = data_plane.running.get(key)
            if request is None:
                continue  # aborted or preempted in the meantime: a later admission computes the same tokens again
            self._start(request, events)
            request.output_token_ids += token_ids
            request.num_fruitless = 0
            events.tokens.append(SampledTokens(request, token_ids, logprobs[key] if logprobs else []))

    def _preempt(self, data_plane: DataPlane, now: float) -> list[EndedRequest]:
        while data_plane.ledger.shortage and len(data_plane.running) > 1:
            self._preempt_one(data_plane, now)
        is_starved, data_plane.is_starved = data_plane.is_starved, False
        if not is_starved or not data_plane.running:
            return []
        victim = self._preempt_one(data_plane, now)
        data_plane.hold(now + STARVED_HOLD_S * 2**victim.num_fruitless if victim.num_fruitless else now)
        return self._give_up_fruitless([victim], "the data plane had no page for it each time, though it ran alone", now)

    def _preempt_one(self, data_plane: DataPlane, now: float) -> Request:
        is_alone = len(data_plane.running) == 1
        victim = self._policy.victim(data_plane.running.values())
        data_plane.abort(victim)
        data_plane.num_preemptions += 1
        victim.num_preemptions += 1
        return self._put_back(victim, now, is_fruitless=is_alone)

    def _put_back(self, request: Request, now: float, *, is_fruitless: bool) -> Request:
        request.num_fruitless += is_fruitless
        request.requeue(now)
        self._waiting.put_back(request)
        return request

    def _give_up_fruitless(self, requests: Sequence[Request], what: str, now: float) -> list[EndedRequest]:
        hopeless = [request for request in requests if request.num_fruitless >= self._config.max_fruitless]
        return self._fail_all([(request, endings.no_progress(request, what)) for request in hopeless], now)

    def _fail_all(self, failures: Sequence[tuple[Request, ServiceError]], now: float) -> list[EndedRequest]:
        ended = [self.end(request, FinishReason.ERROR, now, error) for request, error in failures]
        return [each for each in ended if each is not None]

    def _admit(self, now: float) -> list[EndedRequest]:
        """Admits in order. Who does not fit is passed over; once overtaken often enough, nobody behind takes its place."""
        open_planes = [data_plane for data_plane in self._connected.values() if data_plane.has_place(now)]
        passed: list[Request] = []
        hopeless: list[tuple[Request, ServiceError]] = []
        index = 0
        while open_planes and index < len(self._waiting) and len(passed) <= self._policy.window:
            request = self._waiting[index]
            data_plane = choose(request, open_planes)
            if data_plane is not None:
                self._waiting.pop(index, request)
                data_plane.admit(request, self._next_key, now)
                self._next_key += 1
                for overtaken in passed:
                    overtaken.overtaken += 1
                kept_free = [each for each in passed if self._policy.is_overtaken_enough(each)]
                open_planes = [each for each in open_planes if each.has_place(now) and not each.is_needed_by(kept_free)]
                continue
            index += 1
            shortfall = self.check_fits(request.spec)
            if shortfall is not None:
                hopeless.append((request, endings.never_fits(request, shortfall)))
                continue
            passed.append(request)
            if self._policy.is_overtaken_enough(request):
                open_planes = [each for each in open_planes if not each.is_needed_by([request])]
        return self._fail_all(hopeless, now)

    def _list_adapters(self) -> None:
        data_planes = list(self._connected.values())
        # Who waits comes first: while somebody does, nothing is read for nobody.
        spare = [() if self._waiting else data_plane.idle_prefetch.next(data_plane.pool.free_pages) for data_plane in data_planes]
        listed = (self._waiting.version, self._preload.version, spare)
        if listed == self._listed:
            return
        self._listed = listed
        lists = prefetch_lists(self._waiting.first(LOOKAHEAD), self._preload.digests(), data_planes)
        for data_plane, digests in zip(data_planes, spare, strict=True):
            data_plane.set_lists(tuple(dict.fromkeys((*lists[data_plane.address], *digests))), self._pinned)


# Another scheduler than the real one, for a comparison.
MakeScheduler = Callable[[SchedulerConfig], Scheduler]
