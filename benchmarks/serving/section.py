"""The part of the report about serving under load: tables and plots for each setting. Measures nothing and judges nothing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.markdown import cell, table
from benchmarks.serving import plots
from benchmarks.serving.records import Json, by_setting, describe, runs_of, setting_of, who
from benchmarks.serving.systems import about_system
from benchmarks.serving.targets import targets_section

HEAD = """## Serving under load

The workload of the S-LoRA paper's evaluation through the public API: prompts and outputs of 8 to 511 tokens, adapters of
uniform popularity, random weights. [benchmarks.md](benchmarks.md) says how it is measured and how to measure it again. Requests
come all at once (*saturated*) or at a rate. In the tables

- *req/s* and *tokens/s* are completed requests and their output tokens over all the time until the last stream ended. Towards
  the end the batch empties, so a short run shows less than the service could go on doing.
- *of base* is req/s as a share of the base model's in the same result.
- *TTFT* is the time to the first token, *E2E* that to the last; both count from when a request was planned, not from when it was
  sent. *ITL* are the gaps between tokens at their arrival. Pairs are p50 / p99.
- *on device* is how many adapters were there before the run: registered ones are brought there while the pool has pages to
  spare, unless that is turned off. *hits* is the share of requests whose adapter was there when they could join the batch, of
  those with an adapter, and *adapter wait* how long a request then waited for its own.
- *SLO* is the share of requests with a first token within 6 s, *satisfaction* the paper's: 1 - (TTFT / 6 s)², 0 beyond. *cv* is
  the coefficient of variation of the times between arrivals (1 is Poisson, more comes in bursts).
"""

OVERHEAD = """![Throughput with adapters as a share of the base model's]({plot})
"""

SATURATED = """All requests at once:
"""

SYSTEMS = """What is compared. *of {ours}* is req/s as a share of what {ours} does with the same adapters and requests: in another
run, and where another commit stands beside it, of another version. A few percent may be the runs' own, and what else changed
between the versions is in the other columns too, processor time and ITL above all.
"""

REPEATED = """Runs that were repeated are shown by the one in the middle; req/s of the slowest and the fastest: {spreads}.
"""

FIXED = """So many requests at once, all of the same lengths: 64x128x256 are 64 requests of 128 tokens in and 256 out, adapters
dealt in turn. *sent* is when the last of them was sent, *s* when the last stream had ended. tokens/s counts all of that time,
in which the prompts are computed too. What was repeated is shown by the run in the middle:
"""

OPEN_LOOP = """Arrivals at a rate, in brackets the share of the lowest saturated one with adapters. *req/s* is mostly below
the rate even where nothing queues, as the time in which the last requests come to their end counts too, and more so the shorter
the run; bursts may all have come before the time is up, and then it may be above:
"""

WHERE = """Where the time goes when saturated. *engine*: the share of the time that it spends in steps; waiting for the device is
part of one. *GPU*: the share in which a kernel ran, as the driver samples it. The next three are processor time in cores;
*client* is the busiest of the client processes. *late*: how long after its planned time a request was sent, p99:
"""

MEMORY = """The page pool with {name}. Idle adapters stay on the device until KV, or another adapter, needs their pages:

![The page pool by use over time]({plot})
"""


def serving_section(results: Mapping[str, Json], docs: Path, source: Callable[[str, Json], str]) -> list[str]:
    """Markdown of all results, by name; plots go to `docs`. source: the line that says where a result comes from."""
    settings = by_setting(results)
    overheads = {setting: shares for setting, found in settings.items() if (shares := _overhead(found[0]))}
    lines = [HEAD, *targets_section(settings)]
    if overheads:
        lines.append(OVERHEAD.format(plot=plots.plot_overhead(overheads, docs)))
    for setting, found in settings.items():
        lines += _setting(setting, found, docs)
        for name in sorted(name for name, result in results.items() if setting_of(result) == setting):
            lines += [source(name, results[name]), ""]
    return lines


def _setting(setting: str, results: Sequence[Json], docs: Path) -> list[str]:
    first = results[0]
    plural = "s" if len(first["ranks"]) > 1 else ""
    ranks = f", rank{plural} {', '.join(map(str, first['ranks']))}" if first["ranks"] else ""
    modules = ", ".join(name.removesuffix("_proj") for name in first["modules"])
    lines = [f"### {setting}: {first['model']}{ranks}" + (f" on {modules}" if modules else ""), ""]
    if any(runs_of(result, "saturated") for result in results):
        lines += [SATURATED, *_saturated(results), "", *_repeated(results)]
        if len(results) > 1:
            lines += [SYSTEMS.format(ours=first["system"]), *map(about_system, results), ""]
    lines += _image("Throughput and latency over the number of adapters", plots.plot_adapters(setting, results, docs))
    if any(runs_of(result, "fixed") for result in results):
        lines += [FIXED, *_fixed(results), ""]
    if any(runs_of(result, "open_loop") for result in results):
        lines += [OPEN_LOOP, *_open_loop(results), ""]
        lines += _image("Attainment over rate and burstiness", plots.plot_attainment(setting, results, docs))
    if any(run.get("load") for result in results for run in runs_of(result, "saturated")):
        lines += [WHERE, *_where(results), ""]
    memory = plots.plot_memory(setting, first, docs)
    return lines + ([MEMORY.format(name=memory.run, plot=memory.file)] if memory else [])


def _saturated(results: Sequence[Json]) -> list[str]:
    ours = results[0]
    # By adapters and requests: how many come at once decides the throughput too.
    reached = {(run["num_adapters"], run["num_requests"]): run["requests_per_s"] for run in runs_of(ours, "saturated")}
    rows = []
    for result in results:
        for run in runs_of(result, "saturated"):
            known = reached.get((run["num_adapters"], run["num_requests"])) if result is not ours else None
            rows.append(
                [
                    _name(result, run),
                    f"{run['requests_per_s']:.2f}",
                    cell(run["of_base"] if run["num_adapters"] else None, ".3f"),
                    *([cell(run["requests_per_s"] / known if known else None, ".2f")] if len(results) > 1 else []),
                    f"{run['output_tokens_per_s']:,.0f}",
                    _pair(run["e2e_s"], 1, 1),
                    _pair(run["ttft_s"], 1, 2),
                    _pair(run["itl_s"], 1e3, 1),
                    _on_device(run),
                    cell(run["server"].get("adapter_hit_rate"), ".2f"),
                    _adapter_wait(run),
                    _done(run),
                ]
            )
    compared = [f"of {ours['system']}"] if len(results) > 1 else []
    latencies = ["E2E, s", "TTFT, s", "ITL, ms"]
    head = ["", "req/s", "of base", *compared, "tokens/s", *latencies, "on device", "hits", "adapter wait, ms", "done"]
    return table(head, rows)


def _repeated(results: Sequence[Json]) -> list[str]:
    spreads = [
        f"{_name(result, run)} {min(run['repeats']):.2f} to {max(run['repeats']):.2f}"
        for result in results
        for run in runs_of(result, "saturated")
        if len(run["repeats"]) > 1
    ]
    return [REPEATED.format(spreads="; ".join(spreads))] if spreads else []


def _fixed(results: Sequence[Json]) -> list[str]:
    rows = [
        [
            f"{result['system']}, {describe(run)}",
            f"{run['output_tokens_per_s']:,.0f}",
            _pair(run["ttft_s"], 1e3, 0),
            _pair(run["itl_s"], 1e3, 1),
            f"{run['late_s']['max'] * 1e3:.0f}",
            f"{run['wall_s']:.2f}",
            str(len(run["repeats"])),
        ]
        for result in results
        for run in runs_of(result, "fixed")
    ]
    return table(["", "tokens/s", "TTFT, ms", "ITL, ms", "sent, ms", "s", "repeats"], rows)


def _open_loop(results: Sequence[Json]) -> list[str]:
    rows = []
    for result in results:
        for run in runs_of(result, "open_loop"):
            share = f" ({run['rate_share']:.0%})" if run.get("rate_share") else ""
            rows.append(
                [
                    _name(result, run),
                    f"{run['rate']:.1f}{share}",
                    f"{run['cv']:g}",
                    f"{run['requests_per_s']:.2f}",
                    _pair(run["ttft_s"], 1e3, 0),
                    _pair(run["itl_s"], 1e3, 1),
                    _pair(run["e2e_s"], 1, 1),
                    f"{run['slo_attainment']:.3f}",
                    f"{run['satisfaction']:.3f}",
                    cell(run["server"].get("adapter_hit_rate"), ".2f"),
                    _adapter_wait(run),
                    _done(run),
                ]
            )
    latencies = ["TTFT, ms", "ITL, ms", "E2E, s"]
    head = ["", "req/s asked", "cv", "req/s", *latencies, "SLO", "satisfaction", "hits", "adapter wait, ms", "done"]
    return table(head, rows)


def _where(results: Sequence[Json]) -> list[str]:
    rows = []
    for result in results:
        for run in (run for run in runs_of(result, "saturated") if run.get("load")):
            cpu, wall_s, load = run["cpu_s"], run["wall_s"], run["load"]
            cpu_s = [cpu.get("control_plane"), cpu.get("data_plane"), max(cpu["clients"], default=None)]
            rows.append(
                [
                    _name(result, run),
                    f"{load['mean_step_s'] * 1e3:.2f}",
                    f"{load['engine_busy_share']:.2f}",
                    cell(run["gpu_busy_share"], ".2f"),
                    *(cell(None if spent is None else spent / wall_s, ".2f") for spent in cpu_s),
                    f"{run['tokens_per_message']:.2f}",
                    f"{run['late_s']['p99'] * 1e3:.0f}",
                ]
            )
    cores = ["control plane", "data plane", "client"]
    return table(["", "ms/step", "engine", "GPU", *cores, "tokens/message", "late, ms"], rows)


def _overhead(result: Json) -> dict[int, float]:
    """By number of adapters: saturated throughput as a share of the base model's; empty if that was not measured."""
    runs = runs_of(result, "saturated")
    return {run["num_adapters"]: run["of_base"] for run in runs if run["num_adapters"] and run["of_base"]}


def _name(result: Json, run: Json) -> str:
    return f"{result['system']}, {who(run['num_adapters'])}"


def _pair(spread: Mapping[str, float], factor: float, digits: int) -> str:
    return f"{spread['p50'] * factor:,.{digits}f} / {spread['p99'] * factor:,.{digits}f}" if spread else ""


def _done(run: Json) -> str:
    return f"{run['num_completed']} of {run['num_requests']}"


def _on_device(run: Json) -> str:
    return f"{run['load']['num_resident_before']:,}" if run.get("load") else ""


def _adapter_wait(run: Json) -> str:
    return _pair(run["server"].get("adapter_wait_s", {}), 1e3, 1)


def _image(text: str, file: str | None) -> list[str]:
    return [f"![{text}]({file})", ""] if file else []
