"""Requests, data planes and a wire with any delay between the scheduler and an engine that counts pages for real."""

from collections import deque
from collections.abc import Callable, Sequence

import pytest

from benchmarks.null_engine import GEOMETRY, NullConfig, NullEngine, null_tokens
from benchmarks.scheduling_cost import null_description
from controlplane.messages import AdapterRef, FinishReason, RequestSpec
from controlplane.scheduling import EndedRequest, FcfsPolicy, Request, RequestState, Scheduler, SchedulerConfig
from protos.planes import BatchUpdate, EngineSampling, StepReport

PAGE_TOKENS = GEOMETRY.page_tokens

# A control plane that falls behind gets several reports at once: deliveries take turns at 1, 2, ... of them.
MAX_REPORTS_TOGETHER = 4


def _spec(
    prompt_tokens: int = 4,
    max_tokens: int = 8,
    adapter: AdapterRef | None = None,
    priority: int = 0,
    deadline: float | None = None,
    ttft_deadline: float | None = None,
    seed: int = 0,
) -> RequestSpec:
    return RequestSpec(
        request_id=f"r{seed}",
        prompt_token_ids=tuple(range(1, prompt_tokens + 1)),
        adapter=adapter,
        sampling=EngineSampling(max_tokens=max_tokens, seed=seed),
        priority=priority,
        deadline=deadline,
        ttft_deadline=ttft_deadline,
    )


def _adapter(number: int, num_pages: int = 2) -> AdapterRef:
    return AdapterRef(f"adapter-{number}", f"{number:064x}", num_pages)


class Wire:
    """One data plane: an engine, and the messages that are on their way to and from it."""

    def __init__(self, config: NullConfig, epoch: int) -> None:
        self.engine = NullEngine(config, epoch)
        self.updates: deque[BatchUpdate] = deque()
        self.reports: deque[StepReport] = deque()
        # The first update that frees what the engine held of an earlier session, which the ledger does not know.
        self.clean_at = 0
        # The last update with a list of pinned adapters: what it unpins is in use until it is applied.
        self.pinned_at = 0

    def step(self) -> bool:
        """Lets the engine take one step; True if it had something to say."""
        report = self.engine.step()
        if report is not None:
            self.reports.append(report)
        return report is not None

    def apply_update(self) -> bool:
        """Lets the engine take in one update."""
        if self.updates:
            self.engine.apply(self.updates.popleft())
            return True
        return False


class Harness:
    """A scheduler and its data planes, moved by hand. Checks every law that holds at every moment."""

    def __init__(self, configs: list[NullConfig], policy: FcfsPolicy | None = None, max_waiting: int = 1024) -> None:
        self.scheduler = Scheduler(SchedulerConfig(max_waiting=max_waiting), policy)
        self.configs = configs
        self.wires: dict[str, Wire] = {}
        self.now = 0.0
        self.tokens: dict[Request, list[int]] = {}
        self.started: list[Request] = []
        self.admitted: dict[Request, None] = {}  # in the order of their first admission
        self.ended: dict[Request, EndedRequest] = {}
        self.num_epochs = 0
        self._num_deliveries = 0
        for number in range(len(configs)):
            self.connect(number)

    def submit(self, spec: RequestSpec) -> Request:
        request = self.scheduler.add(spec, self.now)
        self.tokens[request] = []
        self.schedule()
        return request

    def abort(self, request: Request) -> None:
        ended = self.scheduler.end(request, FinishReason.ABORTED, self.now)
        if ended is not None:
            self._end([ended])
        self.schedule()

    def schedule(self) -> None:
        schedule = self.scheduler.schedule(self.now)
        for address, update in schedule.updates:
            self.wires[address].updates.append(update)
            running = self.scheduler.connected[address].running
            self.admitted.update({running[admitted.request_key]: None for admitted in update.admit})
            if update.pinned is not None:
                self.wires[address].pinned_at = update.sequence
        self._end(schedule.ended)
        self.check()

    def connect(self, number: int, keep_engine: Wire | None = None) -> None:
        """Opens a session, with a new start of the data plane unless an engine is given."""
        address = f"dp{number}"
        self.num_epochs += 1
        wire = keep_engine or Wire(self.configs[number], self.num_epochs)
        wire.updates.clear()
        wire.reports.clear()
        first = wire.engine.open_session()
        assert first.state is not None
        wire.pinned_at = 1
        wire.clean_at = 1 if first.state.held_request_keys else 0
        self.wires[address] = wire
        description = null_description(self.configs[number], wire.engine.epoch)
        self.scheduler.data_plane_connected(address, description, first.state)
        self._take(address, [first])

    def lose(self, number: int) -> Wire:
        """Breaks the session; what was on its way is lost."""
        address = f"dp{number}"
        wire = self.wires.pop(address)
        self._end(self.scheduler.data_plane_lost(address, self.now))
        self.schedule()
        return wire

    def deliver_report(self, address: str) -> bool:
        wire = self.wires[address]
        if not wire.reports:
            return False
        self._num_deliveries += 1
        size = min(1 + self._num_deliveries % MAX_REPORTS_TOGETHER, len(wire.reports))
        self._take(address, [wire.reports.popleft() for _ in range(size)])
        return True

    def expire(self) -> None:
        self._end(self.scheduler.expire(self.now))
        self.schedule()

    def turn(self) -> bool:
        """Everything on its way arrives, and every engine takes one step; False if nothing happened."""
        happened = False
        for address, wire in self.wires.items():
            while wire.apply_update():
                happened = True
            happened |= wire.step()
            while self.deliver_report(address):
                happened = True
        return happened

    def run(self, max_turns: int = 3000) -> None:
        """Turns until every request has ended, waking the scheduler when it asked for it."""
        for _ in range(max_turns):
            if len(self.ended) == len(self.tokens):
                break
            if not self.turn():
                wakeup = self.scheduler.next_wakeup(self.now)
                assert wakeup is not None, f"nothing moves: {[r.spec.request_id for r in self.scheduler.unfinished()]}"
                self.now = wakeup
                self.expire()
        assert len(self.ended) == len(self.tokens), "requests are left unfinished"
        while self.turn():
            pass
        for data_plane in self.scheduler.connected.values():
            assert data_plane.ledger.used_pages == data_plane.ledger.adapter_pages
            assert data_plane.ledger.num_requests == 0

    def expected(self, request: Request) -> list[int]:
        sampling = request.spec.sampling
        config = self.configs[0]
        return null_tokens(
            sampling.seed, request.adapter_digest, request.spec.prompt_token_ids, sampling.max_tokens, config.vocab_size
        )

    def check(self) -> None:
        """No request is lost or doubled, and the books agree with themselves."""
        unfinished = self.scheduler.unfinished()
        assert len(set(unfinished)) == len(unfinished)
        assert set(unfinished) | set(self.ended) == set(self.tokens)
        assert not set(unfinished) & set(self.ended)
        for address, data_plane in self.scheduler.connected.items():
            data_plane.ledger.check_integrity()
            for key, request in data_plane.running.items():
                assert (request.state, request.request_key, request.address) == (RequestState.RUNNING, key, address)

    def _take(self, address: str, reports: Sequence[StepReport]) -> None:
        events = self.scheduler.update_from_reports(address, reports, self.now)
        self.started += events.started
        for request, token_ids, _ in events.tokens:
            assert request not in self.ended
            self.tokens[request] += token_ids
        self._end(events.ended)
        report = reports[-1]
        ledger = self.scheduler.connected[address].ledger
        if report.applied_update >= self.wires[address].clean_at:
            assert report.pool.kv_pages <= ledger.kv_pages, "the data plane holds more KV than the ledger says"
            in_use = report.pool.adapter_pages - report.pool.idle_adapter_pages
            is_settled = report.applied_update >= self.wires[address].pinned_at
            assert in_use <= ledger.adapter_pages or not is_settled, (
                "the data plane holds more adapter pages than the ledger says"
            )
        self.schedule()

    def _end(self, all_ended: list[EndedRequest]) -> None:
        for ended in all_ended:
            assert ended.request not in self.ended, "a request ended twice"
            self.ended[ended.request] = ended


@pytest.fixture
def spec() -> Callable[..., RequestSpec]:
    """spec(prompt_tokens, max_tokens, ...) makes a request."""
    return _spec


@pytest.fixture
def adapter() -> Callable[..., AdapterRef]:
    """adapter(number, num_pages) names an adapter."""
    return _adapter


@pytest.fixture
def harness() -> Callable[..., Harness]:
    """harness([config, ...]) connects a scheduler with engines of those sizes."""
    return Harness
