"""The steps that are measured, as rows of the result: which requests, which adapters, and what is set beside them."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

from benchmarks.loading.decode import measure_slowdown
from benchmarks.steps.bench import GREEDY, StepBench
from benchmarks.steps.loop import EndlessDecode, LoopTimes, StepLoop
from benchmarks.steps.parts import BaseParts, LoraParts, StepParts
from benchmarks.steps.settings import StepSettings
from protos.planes import EngineSampling

Row = dict[str, Any]

NO_ADAPTER = "none"
# As many chat clients ask for.
DRAWN = EngineSampling(max_tokens=1 << 20, ignore_eos=True, temperature=0.8, top_p=0.95)


@dataclass(frozen=True, slots=True)
class Decode:
    """Steps of one batch. forward_ms: the model without the host."""

    times: LoopTimes
    forward_ms: float
    lora: LoraParts


class Scenarios:
    """Runs steps on one bench."""

    def __init__(self, bench: StepBench, settings: StepSettings) -> None:
        self._bench = bench
        self._settings = settings

    @property
    def is_cuda(self) -> bool:
        """Whether steps run on a device of their own."""
        return self._bench.loaded.device.type == "cuda"

    def clear(self) -> None:
        """Ends what a failure left behind."""
        self._bench.free_all()

    @cached_property
    def _parts(self) -> StepParts:
        return StepParts(self._bench)

    def decode_rows(self, batch: int) -> list[Row]:
        """Every set of adapters at one batch size."""
        sets = {
            name: list(itertools.islice(itertools.cycle(digests), batch)) for name, digests in self._adapter_sets(batch).items()
        }
        return self.compared_with_base(sets, batch)

    def wide_rows(self) -> list[Row]:
        """All adapters of the bench, one for each request."""
        digests = self._mixed(self._settings.max_large)
        return self.compared_with_base({_ranks_name(len(digests), self._settings.mixed_ranks): digests}, len(digests))

    def compared_with_base(self, sets: dict[str, list[str]], batch: int) -> list[Row]:
        """Batches by the adapters of their requests; the base model is measured before and after them, as one."""
        before = self.decode([""] * batch)
        parts = self._parts.base()
        found = {name: self.decode(digests) for name, digests in sets.items()}
        before.times.extend(self.decode([""] * batch).times)
        base_ms = before.times.step_ms
        rows = [_row(NO_ADAPTER, batch, before, parts, base_ms)]
        for name, digests in sets.items():
            adapters = set(digests)
            weights = {"num_adapters": len(adapters), "lora_bytes": self._bench.adapter_bytes(adapters)}
            rows.append(_row(name, batch, found[name], parts, base_ms) | weights)
        return rows

    def mixed_batch(self) -> Row:
        """Whether base-only requests pay for adapters beside them: half a batch with adapters, alone and with base-only ones."""
        half = self._settings.max_large // 2
        digests = self._bench.digests(self._settings.small_rank, half)
        sets = {"half": [""] * half, "half_lora": digests, "mixed": [*digests, *[""] * half], "base": [""] * 2 * half}
        # Twice in turn: what is looked for is smaller than the drift between the first minute and the second.
        times = {name: self._times(of) for name, of in sets.items()}
        for name, of in sets.items():
            times[name].extend(self._times(of))
        ms = {name: t.step_ms for name, t in times.items()}
        expected = ms["half_lora"] + ms["base"] - ms["half"]
        steps = {f"{name}_ms": value for name, value in ms.items()}
        return {"requests": 2 * half, **steps, "expected_ms": expected, "excess": ms["mixed"] / expected - 1}

    def base_only(self) -> dict[str, Row]:
        """Base-only requests, for comparison with another bench; and the same with tokens drawn by temperature and top_p."""
        batch = [""] * self._settings.max_large
        times, drawn = self._times(batch), self._times(batch, DRAWN)
        times.extend(self._times(batch))
        return {"base_only": times.summary(), "base_only_drawn": drawn.summary()}

    def prompt_rows(self) -> list[Row]:
        """Steps in which a prompt joins those that decode, or comes alone; without adapters and with."""
        settings = self._settings
        lengths = [(settings.num_decodes, n) for n in settings.prompts] + [(0, settings.prefill)]
        digests = self._bench.digests(settings.small_rank, settings.max_large)
        return [self._prompt_row(*pair, of) for pair in lengths for of in ([], digests)]

    def streaming_rows(self) -> list[Row]:
        """What requests of adapters on the device, and base-only ones, pay while others are loaded without a pause. CUDA only."""
        settings, rows = self._settings, []
        bench, batch, rank = self._bench, settings.max_large, settings.large_rank
        sets = {NO_ADAPTER: [""] * batch, f"{batch} of rank {settings.small_rank}": bench.digests(settings.small_rank, batch)}
        for name, digests in sets.items():
            step = EndlessDecode(partial(self._loop, digests, self._start), settings.num_steps)
            found = measure_slowdown(step, bench.copier, [bench.images[rank]], bench.places)
            step.finish()
            about = {"batch": batch, "adapters": name, "num_adapters": len(set(filter(None, digests))), "loaded_rank": rank}
            rows.append({**about, **asdict(found), "ratio": found.ratio})
        return rows

    def decode(self, digests: Sequence[str]) -> Decode:
        """One request for each digest, empty for the base model."""
        times = self._times(digests)
        # The last step that was timed has longer contexts than the median one; the parts are those of one as long as that.
        loop = self._loop(digests, self._settings.context - 1)
        loop.turn()
        loop.finish()
        # The requests are gone, but nobody has written where they were.
        return Decode(times, self._parts.forward_ms(), self._parts.lora())

    def _times(self, digests: Sequence[str], sampling: EngineSampling = GREEDY) -> LoopTimes:
        loop = self._loop(digests, self._start, sampling)
        times = loop.run(self._settings.num_warmup, self._settings.num_steps)
        loop.finish()
        return times

    def _loop(self, digests: Sequence[str], num_tokens: int, sampling: EngineSampling = GREEDY) -> StepLoop:
        return StepLoop(self._bench, [self._bench.decoding(num_tokens, digest, sampling) for digest in digests])

    @property
    def _start(self) -> int:
        """Tokens of a request before the first step, so that it has `context` of them in the middle of the measurement."""
        return self._settings.context - self._settings.num_warmup - self._settings.num_steps // 2

    def _prompt_row(self, num_decodes: int, num_prompt_tokens: int, digests: list[str]) -> Row:
        bench, settings = self._bench, self._settings
        deal = itertools.cycle(digests or [""])
        decoding = [bench.decoding(self._start, next(deal)) for _ in range(num_decodes)]
        loop = StepLoop(bench, decoding, lambda: bench.waiting(num_prompt_tokens, next(deal)))
        times = loop.run(settings.num_warmup // 2, settings.num_steps // 2)
        loop.finish()
        return {
            "decodes": num_decodes,
            "prompt_tokens": num_prompt_tokens,
            "adapters": len(digests),
            "rank": settings.small_rank if digests else 0,
            "tokens_per_s": (num_decodes + num_prompt_tokens) / times.step_ms * 1e3,
            **times.summary(),
        }

    def _adapter_sets(self, batch: int) -> dict[str, list[str]]:
        bench, settings = self._bench, self._settings
        num_large = min(batch, settings.max_large)
        sets = {
            f"{batch} of rank {settings.small_rank}": bench.digests(settings.small_rank, batch),
            f"{num_large} of rank {settings.large_rank}": bench.digests(settings.large_rank, num_large),
        }
        if batch > settings.num_shared:
            shared = bench.digests(settings.small_rank, settings.num_shared)
            sets[f"{settings.num_shared} of rank {settings.small_rank}"] = shared
        if batch >= len(settings.mixed_ranks):
            sets[_ranks_name(num_large, settings.mixed_ranks)] = self._mixed(num_large)
        return sets

    def _mixed(self, count: int) -> list[str]:
        """Adapters of the mixed ranks in turn."""
        ranks = self._settings.mixed_ranks
        by_rank = [self._bench.digests(rank, -(-count // len(ranks))) for rank in ranks]
        return list(itertools.chain.from_iterable(zip(*by_rank, strict=True)))[:count]


def _ranks_name(count: int, ranks: Sequence[int]) -> str:
    return f"{count} of ranks {', '.join(map(str, ranks))}"


def _row(name: str, batch: int, found: Decode, base: BaseParts, base_ms: float) -> Row:
    summary = found.times.summary()
    known_ms = base.gemm_ms + base.attention_ms + found.lora.lora_ms
    row: Row = {
        "batch": batch,
        "adapters": name,
        "num_adapters": 0,
        **summary,
        "base_ms": base_ms,
        "times_base": summary["step_ms"] / base_ms,
        "tokens_per_s": batch / summary["step_ms"] * 1e3,
        "forward_ms": found.forward_ms,
        **asdict(base),
        **asdict(found.lora),
        "other_device_ms": found.forward_ms - known_ms,
        "beside_forward_ms": summary["step_ms"] - found.forward_ms,
    }
    if name == NO_ADAPTER:
        # The estimate; called a floor in results.
        row |= {"floor_ms": base.estimate_ms, "times_floor": summary["step_ms"] / base.estimate_ms}
    return row
