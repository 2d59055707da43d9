"""One run after the other against one server: plan, replay, and everything that is read meanwhile, as one record each.

Knows neither how the server was started nor which protocol it speaks.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.clients import ClientRun, Clients, Progress
from benchmarks.serving.driver import Prompts
from benchmarks.serving.gpu_meter import gpu_utilization
from benchmarks.serving.load_samples import LoadSample, LoadSampler, summarize
from benchmarks.serving.metrics import SLO_S, measure
from benchmarks.serving.outcome import PlannedRequest
from benchmarks.serving.plan import Rate, RunPlan, Workload, draw_trace
from benchmarks.serving.process_cpu import CpuMeter
from benchmarks.serving.trace import TraceRequest

IDLE_TIMEOUT_S = 120.0
SAMPLE_S = 1.0
# Of the requests before the first run, which are not measured.
WARM_UP_LENGTHS = (8, 64)
WARM_UP_ADAPTERS = 8


class BenchError(RuntimeError):
    """A run cannot be made as it was planned."""


# Told of a run's progress: requests in all, and how far it is.
OnProgress = Callable[[int, Progress], None]


@dataclass(frozen=True, slots=True)
class Server:
    """What is measured. names: of the adapters, in the order of their numbers. sampler, pids: of our own service alone.

    pids are of processes on this machine whose processor time is read.
    """

    names: Sequence[str]
    vocab_size: int
    sampler: LoadSampler | None = None
    pids: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Bench:
    """Makes runs and keeps what rates may be shares of."""

    def __init__(self, server: Server, clients: Clients, workload: Workload, slo_s: float = SLO_S) -> None:
        self._server = server
        self._clients = clients
        self._workload = workload
        self._slo_s = slo_s
        self._num_runs = 0
        # Saturated requests a second by number of adapters, of every run.
        self._saturated: dict[int, list[float]] = {}

    async def warm_up(self, num_requests: int) -> None:
        """Short requests at once, of base and a few adapters: what is done once is done before anything is measured.

        A request that fails tells why nothing would work.

        Raises:
            BenchError: one failed.
        """
        names = ["", *self._server.names[:WARM_UP_ADAPTERS]]
        low, high = WARM_UP_LENGTHS
        requests = [
            PlannedRequest(i, 0.0, names[i % len(names)], low + i % (high - low), low + i % 8) for i in range(num_requests)
        ]
        run = await self._replay(requests, lambda total, progress: None)
        failed = next((outcome for outcome in run.outcomes if not outcome.is_ok), None)
        if failed is not None:
            raise BenchError(f"a request of the warm-up failed: {failed.status}: {failed.detail}")

    async def run(self, plan: RunPlan, on_progress: OnProgress) -> dict[str, Any]:
        """Makes one run; the record of it."""
        rate = self._rate(plan.rate)
        requests = self._name(draw_trace(plan, self._workload, rate))
        async with AsyncExitStack() as stack:
            samples: list[LoadSample] = []
            if self._server.sampler is not None:
                await self._server.sampler.wait_idle(IDLE_TIMEOUT_S)
                samples = await stack.enter_async_context(self._server.sampler.sampling(SAMPLE_S))
            gpu = await stack.enter_async_context(gpu_utilization())
            cpu = CpuMeter(self._server.pids)
            run = await self._replay(requests, on_progress)
            cpu_s = cpu.read()
        measured = measure(run.outcomes, run.wall_s, self._slo_s)
        if plan.kind == "saturated":
            self._saturated.setdefault(plan.num_adapters, []).append(measured["requests_per_s"])
        return {
            **self._about(plan, rate),
            **measured,
            "cpu_s": {**cpu_s, "clients": list(run.cpu_s)},
            "gpu_busy_share": sum(gpu) / len(gpu) if gpu else None,
            "load": summarize(samples, run.start_at, run.wall_s) if samples else None,
        }

    def _about(self, plan: RunPlan, rate: float | None) -> dict[str, Any]:
        about: dict[str, Any] = {"kind": plan.kind, "num_adapters": plan.num_adapters}
        if plan.trace is not None:
            return {**about, "trace": plan.trace.name}
        if plan.fixed is not None:
            return {**about, "fixed": str(plan.fixed)}
        about |= {"alpha": self._workload.alpha, "seed": self._workload.seed, "lengths": list(self._workload.lengths)}
        if plan.rate is None:
            return about
        share = plan.rate.value if plan.rate.is_share else None
        return {**about, "rate": rate, "rate_share": share, "cv": plan.cv, "duration_s": self._workload.duration_s}

    def _rate(self, rate: Rate | None) -> float | None:
        if rate is None or not rate.is_share:
            return rate.value if rate else None
        if not self._saturated:
            raise BenchError(f"a rate of {rate.value:.0%} needs a saturated run before it")
        reached = {n: statistics.median(rates) for n, rates in self._saturated.items()}
        rates = [rate for n, rate in reached.items() if n] or list(reached.values())
        # One for all numbers of adapters, so that they can be compared; the lowest, so that all can bear it.
        return rate.value * min(rates)

    def _name(self, trace: Sequence[TraceRequest]) -> list[PlannedRequest]:
        names = self._server.names
        largest = max((request.adapter for request in trace if isinstance(request.adapter, int)), default=-1)
        if largest >= len(names):
            raise BenchError(f"the trace asks for adapter number {largest}; there are {len(names)}, counted from 0")

        def name_of(adapter: int | str | None) -> str:
            return names[adapter] if isinstance(adapter, int) else adapter or ""

        return [
            PlannedRequest(i, r.at_s, name_of(r.adapter), r.input_tokens, r.output_tokens, r.prompt_token_ids)
            for i, r in enumerate(trace)
        ]

    async def _replay(self, requests: Sequence[PlannedRequest], on_progress: OnProgress) -> ClientRun:
        prompts = Prompts((self._workload.seed, self._num_runs), self._server.vocab_size)
        self._num_runs += 1
        return await self._clients.run(requests, prompts, lambda progress: on_progress(len(requests), progress))
