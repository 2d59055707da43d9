"""An engine without tensors: a pool of integers, a host cache that answers when told, a model that hashes what it reads back.

The fake model computes each token from all tokens it finds *through the page table* and from what lies in the adapter's pages,
so a page given to two owners, a wrong slot or an adapter used before its copy shows as a wrong token.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch

from adapter_store.image import AdapterImage, ImageHeader
from dataplane.engine.admission import EngineLimits
from dataplane.engine.engine import Engine
from dataplane.engine.inbox import Inbox, SessionEnd, SessionLost, SessionOpened, UpdateReceived
from dataplane.engine.request_state import RequestState
from dataplane.engine.step_packer import ScheduledChunk
from dataplane.memory.host_images import FetchResult
from dataplane.memory.page_pool import PagePool
from dataplane.memory.residency import Residency
from dataplane.runner.sampling import SampledToken
from kernels.lora import LoraAdapter, LoraRows
from protos.planes import AdmittedRequest, BatchUpdate, EngineFinishReason, EngineSampling, StepReport

VOCAB = 50_000


@lru_cache
def fake_image(digest: str, num_pages: int) -> AdapterImage:
    """An image of that many pages, without modules."""
    header = ImageHeader("", "float32", 1, num_pages, 1, {}, "base", 1, 1.0, False)
    return AdapterImage(digest, header, torch.zeros(1, num_pages, 1))


def token_after(token_ids: Sequence[int], adapter_cells: Sequence[int]) -> int:
    """What the fake model says comes after these tokens."""
    return hash((tuple(token_ids), tuple(adapter_cells))) % VOCAB


def expected_tokens(prompt: Sequence[int], num_tokens: int, digest: str = "", num_image_pages: int = 0) -> list[int]:
    """The output of a request that is served correctly, computed without any pool."""
    token_ids = list(prompt)
    cells = [adapter_cell(digest, i) for i in range(num_image_pages)]
    for _ in range(num_tokens):
        token_ids.append(token_after(token_ids, cells))
    return token_ids[len(prompt) :]


def adapter_cell(digest: str, page_in_image: int) -> int:
    """What a copy writes into a page for this page of the image."""
    return hash((digest, page_in_image))


class FakeHost:
    """Host memory for a few images. Fetches are answered by `deliver`, or at once."""

    def __init__(self, image_pages: Callable[[str], int], capacity: int = 1000, answers_at_once: bool = True) -> None:
        self.image_pages = image_pages
        self.capacity = capacity
        self.answers_at_once = answers_at_once
        self.errors: dict[str, str] = {}
        self.num_fetches = 0
        self.on_evict: Callable[[str], None] = lambda digest: None
        self.pending: list[tuple[str, Callable[[str, FetchResult], None]]] = []
        self._images: OrderedDict[str, AdapterImage] = OrderedDict()

    def fetch(self, digest: str, on_done: Callable[[str, FetchResult], None]) -> None:
        self.num_fetches += 1
        self.pending.append((digest, on_done))
        if self.answers_at_once:
            self.deliver()

    def deliver(self) -> None:
        pending, self.pending = self.pending, []
        for digest, on_done in pending:
            if digest in self.errors:
                on_done(digest, ValueError(self.errors[digest]))
                continue
            image = self._images[digest] = fake_image(digest, self.image_pages(digest))
            while len(self._images) > self.capacity:
                self.on_evict(self._images.popitem(last=False)[0])
            on_done(digest, image)

    def get(self, digest: str) -> AdapterImage | None:
        return self._images.get(digest)

    def digests(self) -> tuple[str, ...]:
        return tuple(self._images)


class FakeCopy:
    """Writes its pages when somebody waits for it, or asks a second time."""

    def __init__(self, write: Callable[[], None], adapter: LoraAdapter, num_polls: int) -> None:
        self._write = write
        self._adapter = adapter
        self._num_polls = num_polls
        self._is_done = False

    @property
    def adapter(self) -> LoraAdapter:
        return self._adapter

    def is_done(self) -> bool:
        self._num_polls -= 1
        if self._num_polls < 0:
            self.wait()
        return self._is_done

    def wait(self) -> None:
        if not self._is_done:
            self._write()
        self._is_done = True

    def join(self) -> None:
        self.wait()


@dataclass(frozen=True)
class FakeStep:
    """A step on its way."""

    tokens: tuple[SampledToken, ...]
    on_wait: Callable[[], None]

    def wait(self) -> tuple[SampledToken, ...]:
        self.on_wait()
        return self.tokens


class FakeDevice:
    """The pool as integers, the copier into it and the model over it."""

    def __init__(self, num_pages: int, page_tokens: int, num_copy_polls: int = 0, runs_ahead: bool = False) -> None:
        self.runs_ahead = runs_ahead
        # What a test wants to come back instead.
        self.alter: Callable[[tuple[SampledToken, ...]], tuple[SampledToken, ...]] = lambda tokens: tokens
        self.on_wait: Callable[[], None] = lambda: None
        self.num_launched = 0
        self._chosen: dict[RequestState, int] = {}
        self.page_tokens = page_tokens
        self.cells = [0] * (num_pages * page_tokens)
        self.num_copy_polls = num_copy_polls
        self.max_step_tokens = 0
        self.adapter_of: Callable[[str], LoraAdapter] = lambda digest: LoraAdapter({})

    def start(self, image: AdapterImage, pages: Sequence[int]) -> FakeCopy:
        def write() -> None:
            for i, page in enumerate(pages):
                self.cells[page * self.page_tokens] = adapter_cell(image.digest, i)

        rows = torch.tensor(list(pages))
        return FakeCopy(write, LoraAdapter({"q_proj": LoraRows(len(pages), 1.0, rows, rows)}), self.num_copy_polls)

    def launch(self, chunks: Sequence[ScheduledChunk]) -> FakeStep:
        """Computes at once, as a device does in the order of launches; what it chose is kept back until somebody waits."""
        self.num_launched += 1
        self.max_step_tokens = max(self.max_step_tokens, sum(chunk.num_scheduled_tokens for chunk in chunks))
        for chunk in chunks:
            known = chunk.request.token_ids.tolist()
            for position in range(chunk.start, chunk.start + chunk.num_scheduled_tokens):
                token_id = known[position] if position < len(known) else self._chosen[chunk.request]
                self.cells[self._slot(chunk, position)] = token_id
        self._chosen = {chunk.request: self._next_token(chunk) for chunk in chunks if chunk.is_last}
        return FakeStep(self.alter(tuple(SampledToken(token_id) for token_id in self._chosen.values())), self.on_wait)

    def _next_token(self, chunk: ScheduledChunk) -> int:
        request = chunk.request
        read = [self.cells[self._slot(chunk, position)] for position in range(chunk.start + chunk.num_scheduled_tokens)]
        adapter_cells: list[int] = []
        if request.adapter_digest:
            pages = self.adapter_of(request.adapter_digest).modules["q_proj"].a_rows.tolist()
            adapter_cells = [self.cells[page * self.page_tokens] for page in pages]
        return token_after(read, adapter_cells)

    def _slot(self, chunk: ScheduledChunk, position: int) -> int:
        return int(chunk.request.page_table[position // self.page_tokens]) * self.page_tokens + position % self.page_tokens


@dataclass
class FakeSink:
    """A session whose reports pile up in a list, up to a bound."""

    session_id: str = "session"
    capacity: int = 10_000
    reports: list[StepReport] = field(default_factory=list)
    num_applied: int = 0
    ended: SessionEnd | None = None

    def has_room(self) -> bool:
        return len(self.reports) < self.capacity

    def send(self, report: StepReport) -> None:
        assert self.has_room()
        self.reports.append(report)

    def update_applied(self) -> None:
        self.num_applied += 1

    def close(self, end: SessionEnd, description: str = "") -> None:
        self.ended = self.ended or end


class FakeClock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class EngineWorld:
    """An engine with everything fake around it, and a control plane's view of it."""

    def __init__(
        self,
        num_pages: int = 64,
        page_tokens: int = 4,
        token_budget: int = 32,
        max_num_seqs: int = 16,
        max_model_len: int = 200,
        image_pages: Callable[[str], int] = lambda digest: 3,
        host_capacity: int = 1000,
        num_copy_polls: int = 0,
        eos_token_ids: tuple[int, ...] = (),
        runs_ahead: bool = False,
    ) -> None:
        self.clock = FakeClock()
        self.inbox = Inbox()
        self.pool = PagePool(num_pages)
        self.host = FakeHost(image_pages, host_capacity)
        self.host.on_evict = self.inbox.put_evicted
        self.device = FakeDevice(num_pages, page_tokens, num_copy_polls, runs_ahead)
        self.residency = Residency(self.pool, self.host, self.device, self.inbox.put_fetched, self.clock)
        self.device.adapter_of = self.residency.adapter
        limits = EngineLimits(VOCAB, eos_token_ids, max_model_len, max_num_seqs, token_budget, num_pages, page_tokens)
        self.engine = Engine(self.inbox, self.device, self.pool, self.residency, limits, 7, 30.0, self.clock)
        self.sink = FakeSink()
        self._sequence = itertools.count(1)
        self._num_read = 0
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, tuple[EngineFinishReason, str]] = {}
        self.connect(self.sink)

    def connect(self, sink: FakeSink) -> None:
        """Opens a session."""
        self.sink = sink
        self._sequence = itertools.count(1)
        self._num_read = 0
        self.inbox.put(SessionOpened(sink))
        self.turn()

    def disconnect(self) -> None:
        """Loses the session."""
        self.inbox.put(SessionLost(self.sink))

    def update(
        self,
        admit: Sequence[AdmittedRequest] = (),
        abort: Sequence[int] = (),
        prefetch: Sequence[str] | None = None,
        pinned: Sequence[str] | None = None,
    ) -> int:
        """Sends the session's next update and returns its sequence number."""
        sequence = next(self._sequence)
        lists = [None if digests is None else tuple(digests) for digests in (prefetch, pinned)]
        self.inbox.put(UpdateReceived(self.sink, BatchUpdate(sequence, tuple(abort), tuple(admit), *lists)))
        return sequence

    def turn(self) -> list[StepReport]:
        """One turn of the engine, after which everything must add up. Returns its reports."""
        self.engine.turn(may_wait=False)
        self.engine.check_integrity()
        reports = self.sink.reports[self._num_read :]
        self._num_read += len(reports)
        for report in reports:
            for key, token_id in zip(report.request_keys, report.token_ids, strict=True):
                self.tokens.setdefault(key, []).append(token_id)
            for finished in report.finished:
                assert finished.request_key not in self.finished, f"request {finished.request_key} finished twice"
                self.finished[finished.request_key] = (finished.reason, finished.error)
        return reports

    def run_until_idle(self, max_turns: int = 2000) -> list[StepReport]:
        """Turns until one brings nothing. Returns all their reports."""
        reports: list[StepReport] = []
        for _ in range(max_turns):
            news = self.turn()
            reports += news
            if not news:
                return reports
        raise AssertionError(f"the engine was not idle after {max_turns} turns")


def admitted(
    key: int, prompt: Sequence[int], max_tokens: int = 5, digest: str = "", output: Sequence[int] = (), **sampling: object
) -> AdmittedRequest:
    """A request as the control plane admits it."""
    params = EngineSampling(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]  # whatever the test wants to set
    return AdmittedRequest(key, f"request-{key}", (*prompt, *output), len(output), digest, params)


# The types of the fixtures below.
MakeWorld = type[EngineWorld]
Admit = Callable[..., AdmittedRequest]
Expect = Callable[..., list[int]]


@pytest.fixture
def make_world() -> type[EngineWorld]:
    """Makes an engine with fakes around it."""
    return EngineWorld


@pytest.fixture
def make_sink() -> type[FakeSink]:
    """Makes another session."""
    return FakeSink


@pytest.fixture
def admit() -> Callable[..., AdmittedRequest]:
    """Makes admitted requests."""
    return admitted


@pytest.fixture
def expect() -> Callable[..., list[int]]:
    """What a request must give."""
    return expected_tokens
