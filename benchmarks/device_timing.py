"""How long something takes on a device: as the replay of a CUDA graph, between events, or as the host sees it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

NUM_REPLAYS = 30
NUM_WARMUP = 3
# Elsewhere than on CUDA nothing is measured, it only runs.
NUM_RUNS_CPU = 3


@dataclass(frozen=True, slots=True)
class Times:
    """Of several runs of the same, in milliseconds."""

    median_ms: float
    min_ms: float
    max_ms: float


def device_name(device: str) -> str | None:
    """For a result; None is the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The graph of what is launched, after a first time outside of it, at which things are made and chosen."""
    # Off the default stream, as capturing wants it, and behind everything that was launched there.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replay_times(run: Callable[[], None], scale: float = 1.0) -> Times:
    """Replays of the graph of what is launched, one at a time."""
    graph = capture(run)
    times = [scale * elapsed_ms(graph.replay) for _ in range(NUM_WARMUP + NUM_REPLAYS)][NUM_WARMUP:]
    return Times(statistics.median(times), min(times), max(times))


def time_ms(run: Callable[[], None], device: torch.device) -> float:
    """Median of several runs: of replays of a graph on CUDA, of what it is elsewhere."""
    if device.type == "cuda":
        return replay_times(run).median_ms
    return statistics.median(elapsed_ms(run, device) for _ in range(NUM_RUNS_CPU))


def elapsed_ms(run: Callable[[], None], device: torch.device | None = None) -> float:
    """From the start of the first thing launched to the end of the last, on the device (CUDA unless named)."""
    if device is not None and device.type != "cuda":
        started_at = time.perf_counter()
        run()
        return (time.perf_counter() - started_at) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def host_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median of what the host spends on a call, each on an idle device."""
    times = []
    for _ in range(NUM_REPLAYS if device.type == "cuda" else NUM_RUNS_CPU):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started_at = time.perf_counter()
        run()
        times.append((time.perf_counter() - started_at) * 1e3)
    return statistics.median(times)
