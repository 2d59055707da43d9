"""How long the scheduler takes for one report, with a full batch and a long queue: pure logic, no I/O."""

import itertools
import random
import statistics
import time

from benchmarks.null_engine import NullConfig, NullEngine
from benchmarks.percentiles import percentiles
from controlplane.messages import AdapterRef, DataPlaneDescription, RequestSpec
from controlplane.scheduling import Schedule, Scheduler, SchedulerConfig
from protos.planes import EngineSampling

ADDRESS = "data plane"
NUM_REPORTS = 2000
NUM_ADAPTERS = 2000


def measure_scheduling(num_running: int, num_waiting: int) -> dict[str, float]:
    """Milliseconds that the scheduler takes to book a report and decide, while requests of many adapters come and go.

    Who arrived during a step is decided upon behind its report, so that all that is decided is in the time.
    """
    config = NullConfig(num_pages=num_running * 16, max_num_seqs=num_running)
    engine = NullEngine(config)
    scheduler = Scheduler(SchedulerConfig(max_waiting=2 * num_waiting))
    state = engine.open_session().state
    assert state is not None
    scheduler.data_plane_connected(ADDRESS, null_description(config, engine.epoch), state)
    rng, numbers = random.Random(0), itertools.count()
    now = 0.0
    times_s: list[float] = []

    def fill_queue() -> None:
        while scheduler.num_waiting < num_waiting:
            scheduler.add(_spec(rng, next(numbers)), now)

    def apply(schedule: Schedule) -> None:
        for _, update in schedule.updates:
            engine.apply(update)

    fill_queue()
    apply(scheduler.schedule(now))
    while len(times_s) < NUM_REPORTS:
        report = engine.step()
        assert report is not None, "with requests that run there is always a report"
        fill_queue()
        now += 0.01
        started = time.perf_counter()
        scheduler.update_from_reports(ADDRESS, [report], now)
        schedule = scheduler.schedule(now)
        elapsed_s = time.perf_counter() - started
        apply(schedule)
        if scheduler.num_running >= 0.9 * num_running:
            times_s.append(elapsed_s)
    p50_s, p99_s = percentiles(times_s, 50, 99)
    return {
        "num_running": scheduler.num_running,
        "num_waiting": num_waiting,
        "mean_ms": statistics.mean(times_s) * 1e3,
        "p50_ms": p50_s * 1e3,
        "p99_ms": p99_s * 1e3,
    }


def _spec(rng: random.Random, number: int) -> RequestSpec:
    adapter = rng.randrange(NUM_ADAPTERS)
    sampling = EngineSampling(max_tokens=rng.randrange(50, 150), seed=number)
    ref = AdapterRef(f"adapter-{adapter}", f"{adapter:064x}", 2)
    return RequestSpec(f"request-{number}", tuple(range(rng.randrange(8, 64))), ref, sampling)


def null_description(config: NullConfig, epoch: int) -> DataPlaneDescription:
    """What a data plane with a NullEngine of these sizes says of itself."""
    return DataPlaneDescription(
        epoch=epoch,
        version="null",
        geometry=config.geometry,
        architecture="Null",
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        num_pages=config.num_pages,
        device="none",
        max_num_seqs=config.max_num_seqs,
        token_budget=config.token_budget,
        max_model_len=config.max_model_len,
    )
