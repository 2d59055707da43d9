"""An engine that computes nothing: its tokens are hashes, its pages are counted, not held. Pure, without a clock to wait on.

It packs steps as the real engine does (decode first, chunked prefill, older admissions get pages first), so that starvation,
adapter loads and preemption take their real course. It shares no code with that engine, so that it shares no bug with it. It is
one file, as any part of it would need all of its state.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from protos.planes import (
    AdapterEvent,
    AdapterPlace,
    AdapterReady,
    AdmittedRequest,
    BatchUpdate,
    EngineFinishReason,
    EngineState,
    FinishedRequest,
    PoolCounts,
    StepLogprobs,
    StepReport,
    StepTiming,
)

GEOMETRY = BaseGeometry(
    model_name="null",
    fingerprint="0" * 64,
    dtype="float32",
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    modules=tuple(LinearShape(name, 8, 8) for name in LORA_MODULES),
    max_lora_rank=64,
)


@dataclass(frozen=True, slots=True)
class NullConfig:
    """Sizes of the data plane that is played. Every adapter takes `adapter_pages`, and `adapter_steps` steps to load.

    runs_ahead: a step has the pages of the next one already when it is reported, as in an engine that launches a step while the
        one before it computes.
    """

    num_pages: int = 65536
    max_num_seqs: int = 256
    token_budget: int = 8192
    max_model_len: int = 8192
    vocab_size: int = 32000
    eos_token_ids: tuple[int, ...] = ()
    adapter_pages: int = 2
    adapter_steps: int = 2
    broken_adapters: frozenset[str] = frozenset()
    step_s: float = 0.0
    runs_ahead: bool = False
    geometry: BaseGeometry = GEOMETRY


def _salt(digest: str) -> int:
    return sum(digest.encode())


def _token(seed: int, salt: int, position: int, previous: int, vocab_size: int) -> int:
    """The token at a position: the same wherever and whenever it is computed."""
    mixed = (seed ^ (position * 0x9E3779B97F4A7C15) ^ (previous * 0xC2B2AE3D27D4EB4F)) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 + salt) & 0xFFFFFFFFFFFFFFFF
    return (mixed >> 17) % vocab_size


def null_tokens(seed: int, digest: str, prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """The first so many output tokens of a request."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_token(seed, _salt(digest), len(tokens), tokens[-1], vocab_size))
    return tokens[len(prompt) :]


@dataclass(slots=True, eq=False)
class _Held:
    """A request of the standing set: how far it is, and how many pages that takes."""

    admitted: AdmittedRequest
    num_tokens: int
    num_output: int
    last_token: int
    salt: int
    num_computed: int = 0
    pages: int = 0
    is_ready: bool = False
    steps_waited: int = 0


@dataclass(slots=True)
class _Draft:
    """What the next report says."""

    keys: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: dict[int, StepLogprobs] = field(default_factory=dict)
    finished: list[FinishedRequest] = field(default_factory=list)
    starved: list[int] = field(default_factory=list)
    ready: list[AdapterReady] = field(default_factory=list)
    events: list[AdapterEvent] = field(default_factory=list)
    num_prefill: int = 0
    is_changed: bool = False


class NullEngine:
    """Standing set and page counts. Pure: `apply` updates, call `step`, get a report or None if there is nothing to say."""

    def __init__(self, config: NullConfig, epoch: int = 1) -> None:
        self.config = config
        self._page_tokens = config.geometry.page_tokens
        self.epoch = epoch
        self.standing: dict[int, _Held] = {}
        self.loading: dict[str, int] = {}  # digest: steps to go
        self.on_device: dict[str, None] = {}  # least recently used first
        self._users: Counter[str] = Counter()
        self._kv_pages = 0
        self._stolen_pages = 0
        self._pinned: frozenset[str] = frozenset()
        self.prefetch: tuple[str, ...] = ()
        self._sequence = self._applied = self._num_steps = 0
        self._starved_before: list[int] = []
        self._draft = _Draft()
        self._awaits_update = True

    def open_session(self) -> StepReport:
        """Forgets the session before and returns the first report of a new one."""
        self._sequence = self._applied = 0
        self._draft, self._awaits_update = _Draft(), True
        events = tuple(AdapterEvent(d, AdapterPlace.DEVICE, self.config.adapter_pages) for d in self.on_device)
        return self._report(0.0, EngineState(self.epoch, tuple(self.standing), events))

    def steal_pages(self, num_pages: int) -> None:
        """Takes pages away for good, to play a data plane that has less room than the other side believes."""
        self._stolen_pages += num_pages

    def apply(self, update: BatchUpdate) -> None:
        """Takes in an update: abort, admit, prefetch, pinned."""
        self._awaits_update, self._applied, self._draft.is_changed = False, update.sequence, True
        for key in update.abort:
            self._drop(key)
        for admitted in update.admit:
            self._admit(admitted)
        if update.prefetch is not None:
            self.prefetch = update.prefetch
        if update.pinned is not None:
            self._pinned = frozenset(update.pinned)

    def step(self) -> StepReport | None:
        """One step. None if nothing was computed and nothing changed: then only an update can change anything."""
        started = time.perf_counter()
        if not self._awaits_update:
            self._load_adapters()
            self._compute()
        draft = self._draft
        draft.is_changed |= bool(draft.events or draft.finished) or draft.starved != self._starved_before
        self._starved_before = draft.starved
        if not (draft.keys or draft.num_prefill or draft.is_changed or any(self.loading.values())):
            self._draft = _Draft()
            return None
        self._num_steps += 1
        return self._report(time.perf_counter() - started, None)

    @property
    def counts(self) -> PoolCounts:
        """Pages by use."""
        adapters = self.config.adapter_pages * len(self.on_device)
        return PoolCounts(self._kv_pages, adapters, self._idle_pages, self._free_pages)

    def _idle_adapters(self) -> list[str]:
        return [digest for digest in self.on_device if not self._users[digest] and digest not in self._pinned]

    def _admit(self, admitted: AdmittedRequest) -> None:
        key, num_tokens = admitted.request_key, len(admitted.token_ids)
        if key in self.standing or len(self.standing) >= self.config.max_num_seqs or num_tokens >= self.config.max_model_len:
            self._draft.finished.append(FinishedRequest(key, EngineFinishReason.REJECTED, "duplicate, too many or too long"))
            return
        held = _Held(admitted, num_tokens, admitted.num_output_tokens, admitted.token_ids[-1], _salt(admitted.adapter_digest))
        held.is_ready = not admitted.adapter_digest
        self.standing[key] = held
        self._users[admitted.adapter_digest] += 1

    def _drop(self, key: int) -> None:
        held = self.standing.pop(key, None)
        if held is not None:
            self._kv_pages -= held.pages
            self._users[held.admitted.adapter_digest] -= 1

    def _load_adapters(self) -> None:
        wanted = {held.admitted.adapter_digest: None for held in self.standing.values() if held.admitted.adapter_digest}
        for digest in (*wanted, *self.prefetch):
            if digest not in self.on_device and digest not in self.loading:
                self.loading[digest] = self.config.adapter_steps
                self._draft.events.append(AdapterEvent(digest, AdapterPlace.FETCHING))
        for digest in self.loading:
            self.loading[digest] = max(0, self.loading[digest] - 1)
        for digest in [d for d, steps in self.loading.items() if steps == 0 and d in self.config.broken_adapters]:
            del self.loading[digest]
            self._draft.events.append(AdapterEvent(digest, AdapterPlace.FAILED, error="broken"))
            for key in [k for k, held in self.standing.items() if held.admitted.adapter_digest == digest]:
                self._finish(key, EngineFinishReason.ADAPTER_FAILED, "broken")
        for digest in [d for d in self.prefetch if self.loading.get(d) == 0 and d not in wanted]:
            if self._free_pages >= self.config.adapter_pages + len(self.standing):
                self._activate(digest)

    def _compute(self) -> None:
        decoding = sum(held.num_computed == held.num_tokens - 1 for held in self.standing.values())
        budget = self.config.token_budget - decoding
        may_allocate = True
        for key, held in list(self.standing.items()):
            if not held.is_ready and not self._make_ready(held, may_allocate):
                if self.loading.get(held.admitted.adapter_digest) == 0:
                    self._draft.starved.append(key)
                    may_allocate = False
                continue
            is_decode = held.num_computed == held.num_tokens - 1
            wanted = 1 if is_decode else min(held.num_tokens - held.num_computed, budget)
            granted = self._grow(held, wanted) if may_allocate else self._room(held, wanted)
            if granted < wanted:
                may_allocate = False
                if granted == 0:
                    self._draft.starved.append(key)
            held.num_computed += granted
            budget -= 0 if is_decode else granted
            self._draft.num_prefill += 0 if is_decode else granted
            if granted and held.num_computed == held.num_tokens:
                self._sample(key, held)
        if self.config.runs_ahead:
            for held in self.standing.values():
                if held.is_ready and held.num_computed == held.num_tokens - 1:
                    self._grow(held, 1)

    def _make_ready(self, held: _Held, may_allocate: bool) -> bool:
        digest = held.admitted.adapter_digest
        if digest not in self.on_device:
            if self.loading.get(digest) != 0 or not may_allocate or not self._reclaim(self.config.adapter_pages):
                held.steps_waited += 1
                return False
            self._activate(digest)
        self.on_device[digest] = self.on_device.pop(digest)
        held.is_ready = True
        self._draft.ready.append(AdapterReady(held.admitted.request_key, held.steps_waited * 1e-3))
        return True

    def _activate(self, digest: str) -> None:
        del self.loading[digest]
        self.on_device[digest] = None
        self._draft.events.append(AdapterEvent(digest, AdapterPlace.DEVICE, self.config.adapter_pages, 4096))

    @property
    def _free_pages(self) -> int:
        adapters = self.config.adapter_pages * len(self.on_device)
        return self.config.num_pages - self._stolen_pages - self._kv_pages - adapters

    @property
    def _idle_pages(self) -> int:
        return self.config.adapter_pages * len(self._idle_adapters())

    def _reclaim(self, num_pages: int) -> bool:
        if self._free_pages >= num_pages:
            return True
        if self._free_pages + self._idle_pages < num_pages:
            return False
        for digest in self._idle_adapters():
            if self._free_pages >= num_pages:
                break
            del self.on_device[digest]
            self._draft.events.append(AdapterEvent(digest, AdapterPlace.NONE))
        return True

    def _room(self, held: _Held, wanted: int) -> int:
        return min(wanted, held.pages * self._page_tokens - held.num_computed)

    def _grow(self, held: _Held, wanted: int) -> int:
        missing = ceil((held.num_computed + wanted) / self._page_tokens) - held.pages
        if missing > 0:
            granted = missing if self._free_pages >= missing else min(missing, self._free_pages + self._idle_pages)
            self._reclaim(granted)
            held.pages += granted
            self._kv_pages += granted
        return self._room(held, wanted)

    def _sample(self, key: int, held: _Held) -> None:
        sampling, config = held.admitted.sampling, self.config
        token = _token(sampling.seed, held.salt, held.num_tokens, held.last_token, config.vocab_size)
        held.last_token = token
        held.num_tokens += 1
        held.num_output += 1
        self._draft.keys.append(key)
        self._draft.tokens.append(token)
        if sampling.num_logprobs is not None:
            top = tuple(range(sampling.num_logprobs))
            self._draft.logprobs[key] = StepLogprobs(-1.0, top, (-1.0,) * len(top))
        may_stop = held.num_output >= sampling.min_tokens
        if may_stop and token in sampling.stop_token_ids:
            self._finish(key, EngineFinishReason.STOP_TOKEN)
        elif may_stop and not sampling.ignore_eos and token in config.eos_token_ids:
            self._finish(key, EngineFinishReason.EOS)
        elif held.num_output >= sampling.max_tokens or held.num_tokens >= config.max_model_len:
            self._finish(key, EngineFinishReason.LENGTH)

    def _finish(self, key: int, reason: EngineFinishReason, error: str = "") -> None:
        self._draft.finished.append(FinishedRequest(key, reason, error))
        self._drop(key)

    def _report(self, duration_s: float, state: EngineState | None) -> StepReport:
        draft, self._draft = self._draft, _Draft()
        self._sequence += 1
        return StepReport(
            sequence=self._sequence,
            applied_update=self._applied,
            request_keys=tuple(draft.keys),
            token_ids=tuple(draft.tokens),
            logprobs=draft.logprobs,
            finished=tuple(draft.finished),
            starved=tuple(draft.starved),
            adapter_events=tuple(draft.events),
            adapter_ready=tuple(draft.ready),
            pool=self.counts,
            timing=StepTiming(self._num_steps, duration_s, draft.num_prefill, len(draft.keys)),
            state=state,
        )
