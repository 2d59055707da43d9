"""What a benchmark shows while it runs: a progress bar on a terminal, one line per finished run anywhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.serving import clients
from benchmarks.serving.bench import OnProgress
from benchmarks.serving.plan import RunPlan
from benchmarks.serving.records import who

# A client that is later than this, or busier, may have measured itself.
LATE_S = 0.05
BUSY_SHARE = 0.85


@contextmanager
def run_progress(plan: RunPlan) -> Iterator[OnProgress]:
    """A bar for one run; nothing where the errors go to no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name_of(plan), total=None, state="")

        def on_progress(num_requests: int, seen: clients.Progress) -> None:
            state = f"{seen.num_sent - seen.num_finished} under way, {seen.num_tokens:,} tokens"
            bar.update(task, total=num_requests, completed=seen.num_finished, state=state)

        yield on_progress


def name_of(plan: RunPlan) -> str:
    """A run in few words."""
    if plan.trace is not None:
        return f"trace {plan.trace.name}"
    name = who(plan.num_adapters)
    if plan.fixed is not None:
        return f"{name}, {plan.fixed}"
    if plan.rate is None:
        return f"{name}, all at once"
    rate = f"{plan.rate.value:.0%}" if plan.rate.is_share else f"{plan.rate.value:g}/s"
    return f"{name}, {rate}" + (f", cv {plan.cv:g}" if plan.cv != 1 else "")


def show_run(plan: RunPlan, run: dict[str, Any]) -> None:
    """The record of a run on one line, and lines for what is wrong with it."""
    parts = [
        f"{run['requests_per_s']:7.2f} req/s {run['output_tokens_per_s']:8,.0f} tok/s",
        "TTFT " + _spread(run["ttft_s"], 1, "s"),
        "ITL " + _spread(run["itl_s"], 1e3, "ms"),
        f"SLO {run['slo_attainment']:.3f}",
    ]
    server, load, cpu = run["server"], run["load"], run["cpu_s"]
    if server.get("adapter_hit_rate") is not None:
        parts.append(f"hits {server['adapter_hit_rate']:.2f}")
    if load:
        parts.append(f"resident {load['num_resident_before']}")
        parts.append(f"engine {load['engine_busy_share']:.2f} ({load['mean_step_s'] * 1e3:.1f} ms/step)")
    if run["gpu_busy_share"] is not None:
        parts.append(f"GPU {run['gpu_busy_share']:.2f}")
    busy = {name: cpu[name] / run["wall_s"] for name in ("control_plane", "data_plane") if name in cpu and run["wall_s"]}
    parts += [f"{name.removesuffix('_plane')} cpu {share:.2f}" for name, share in busy.items()]
    print(f"{name_of(plan):28s} " + " | ".join(parts), flush=True)
    for warning in warnings(run):
        print(f"  ! {warning}", flush=True)


def warnings(run: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    found = [f"{error['count']} requests: {status}: {error['first']}" for status, error in run["errors"].items()]
    if run["num_wrong_length"]:
        found.append(f"{run['num_wrong_length']} completed requests have fewer or more tokens than were asked for")
    # All at once means that some wait for the others to be sent; there is no arrival process to be late for.
    if run["kind"] in ("open_loop", "trace") and run["late_s"] and run["late_s"]["p99"] > LATE_S:
        found.append(f"the client was late, p99 {run['late_s']['p99'] * 1e3:.0f} ms; more --clients may help")
    busiest = max(run["cpu_s"]["clients"], default=0.0)
    if run["wall_s"] and busiest / run["wall_s"] > BUSY_SHARE:
        found.append(f"a client process was busy {busiest / run['wall_s']:.0%} of the time; more --clients may help")
    return found


def _spread(values: dict[str, float], factor: float, unit: str) -> str:
    if not values:
        return "-"
    return f"{values['p50'] * factor:.3g}/{values['p99'] * factor:.3g} {unit}"
