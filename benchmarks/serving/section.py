"""The part of the report about serving under load: tables and plots for each setting. Measures nothing and judges nothing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.serving import plots

Json = dict[str, Any]

# Ours comes first; results of it are the ones that others are compared with.
OURS = "loraplane"

HEAD = """## Serving under load

The workload of the S-LoRA paper's evaluation through the public API: prompts and outputs of 8 to 511 tokens, adapters of
uniform popularity, random weights. [benchmarks.md](benchmarks.md) says how it is measured and how to measure it again.
Requests come all at once (*saturated*) or at a rate; cv is the coefficient of variation of the times between them (1 is
Poisson). Latencies count from the time at which a request was planned: TTFT to the first token, E2E to the end; ITL are the
gaps between tokens at their arrival. *SLO* is the share of requests with a first token within 6 s, *satisfaction* the
paper's, *hits* the share that waited less than 1 ms for its adapter once in the batch. *of base* compares with the base model
alone in the same run.

Of the time: *engine* is the share spent in steps (waiting for the device is part of one), *GPU* that in which a kernel ran, as
the driver samples it; processor time is in cores, of control plane, data plane and the busiest client process; *late* is how
long after its planned time a request was sent, p99.
"""

OVERHEAD = """![Throughput with adapters as a share of the base model's]({plot})
"""

SATURATED = """All requests at once; pairs are p50 / p99:
"""

COMPARED = """Requests/s of other systems under the same requests; in brackets, how many times that {ours} reaches:
"""

OPEN_LOOP = """Arrivals at a rate, in brackets the share of the lowest saturated one with adapters; pairs are p50 / p99:
"""

WHERE = """Where the time goes when saturated:
"""

MEMORY = """The page pool with {name}:

![The page pool by use over time]({plot})
"""


def serving_section(results: Mapping[str, Json], docs: Path, source: Callable[[str, Json], str]) -> list[str]:
    """Markdown of all results, by name; plots go to `docs`. source: the line that says where a result comes from."""
    settings = _by_setting(results)
    overheads = {setting: shares for setting, found in settings.items() if (shares := _overhead(found[0]))}
    lines = [HEAD]
    if overheads:
        lines.append(OVERHEAD.format(plot=plots.plot_overhead(overheads, docs)))
    for setting, found in settings.items():
        lines += _setting(setting, found, docs)
        for name in sorted(name for name, result in results.items() if _setting_of(result) == setting):
            lines += [source(name, results[name]), ""]
    return lines


def _by_setting(results: Mapping[str, Json]) -> dict[str, list[Json]]:
    """By setting, one result for each system, ours first. Results of one system are taken together: their runs are its runs."""
    found: dict[str, dict[str, Json]] = {}
    for _, result in sorted(results.items()):
        systems = found.setdefault(_setting_of(result), {})
        base = plots.base_rate(result)
        # Beside the base model of the same result alone, whatever else there is.
        runs = [{**run, "of_base": run["requests_per_s"] / base if base else None} for run in result["runs"]]
        known = systems.setdefault(result["system"], {**result, "runs": []})
        known["runs"] = [*known["runs"], *runs]
    return {
        setting: sorted(systems.values(), key=lambda result: (result["system"] != OURS, result["system"]))
        for setting, systems in sorted(found.items())
    }


def _setting_of(result: Json) -> str:
    return str(result["setting"] or result["model"])


def _setting(setting: str, results: Sequence[Json], docs: Path) -> list[str]:
    first = results[0]
    ranks = f", ranks {', '.join(map(str, first['ranks']))}" if first["ranks"] else ""
    modules = ", ".join(name.removesuffix("_proj") for name in first["modules"])
    lines = [f"### {setting}: {first['model']}{ranks}" + (f" on {modules}" if modules else ""), ""]
    if any(_runs(result, "saturated") for result in results):
        lines += [SATURATED, *_saturated(results), ""]
        if len(results) > 1:
            lines += [COMPARED.format(ours=first["system"]), *_compared(results), ""]
    lines += _image("Throughput and latency over the number of adapters", plots.plot_adapters(setting, results, docs))
    if any(_runs(result, "open_loop") for result in results):
        lines += [OPEN_LOOP, *_open_loop(results), ""]
        lines += _image("Attainment over rate and burstiness", plots.plot_attainment(setting, results, docs))
    if any(run.get("load") for result in results for run in _runs(result, "saturated")):
        lines += [WHERE, *_where(results), ""]
    memory = plots.plot_memory(setting, first, docs)
    return lines + ([MEMORY.format(name=memory.run, plot=memory.file)] if memory else [])


def _saturated(results: Sequence[Json]) -> list[str]:
    rows = []
    for result in results:
        for run in _runs(result, "saturated"):
            share = f"{run['of_base']:.3f}" if run["of_base"] and run["num_adapters"] else ""
            rows.append(
                [
                    _name(result, run),
                    f"{run['requests_per_s']:.2f}",
                    share,
                    f"{run['output_tokens_per_s']:,.0f}",
                    _pair(run["e2e_s"], 1, 1),
                    _pair(run["ttft_s"], 1, 2),
                    _pair(run["itl_s"], 1e3, 1),
                    _hits(run),
                    f"{run['num_completed']} of {run['num_requests']}",
                ]
            )
    return table(["", "req/s", "of base", "tokens/s", "E2E, s", "TTFT, s", "ITL, ms", "hits", "done"], rows)


def _compared(results: Sequence[Json]) -> list[str]:
    systems = [{run["num_adapters"]: run["requests_per_s"] for run in _runs(result, "saturated")} for result in results]
    ours, others = systems[0], systems[1:]

    def cell(system: Mapping[int, float], n: int) -> str:
        reached = system.get(n)
        if not reached:
            return ""
        return f"{reached:.2f} ({ours[n] / reached:.1f})" if n in ours else f"{reached:.2f}"

    rows = [
        [_who(n), f"{ours[n]:.2f}" if n in ours else "", *(cell(system, n) for system in others)]
        for n in sorted({n for system in systems for n in system})
    ]
    return table(["", *(result["system"] for result in results)], rows)


def _open_loop(results: Sequence[Json]) -> list[str]:
    rows = []
    for result in results:
        for run in _runs(result, "open_loop"):
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
                    _hits(run),
                ]
            )
    head = ["", "req/s asked", "cv", "done", "TTFT, ms", "ITL, ms", "E2E, s", "SLO", "satisfaction", "hits"]
    return table(head, rows)


def _where(results: Sequence[Json]) -> list[str]:
    rows = []
    for result in results:
        for run in (run for run in _runs(result, "saturated") if run.get("load")):
            cpu, wall_s, load = run["cpu_s"], run["wall_s"], run["load"]
            cores = [cpu.get("control_plane"), cpu.get("data_plane"), max(cpu["clients"], default=None)]
            rows.append(
                [
                    _name(result, run),
                    f"{load['mean_step_s'] * 1e3:.2f}",
                    f"{load['engine_busy_share']:.2f}",
                    "" if run["gpu_busy_share"] is None else f"{run['gpu_busy_share']:.2f}",
                    *("" if spent is None else f"{spent / wall_s:.2f}" for spent in cores),
                    f"{run['tokens_per_message']:.2f}",
                    f"{run['late_s']['p99'] * 1e3:.0f}",
                ]
            )
    head = ["", "ms/step", "engine", "GPU", "control plane", "data plane", "client", "tokens/message", "late, ms"]
    return table(head, rows)


def _overhead(result: Json) -> dict[int, float]:
    """By number of adapters: saturated throughput as a share of the base model's; empty if that was not measured."""
    return {run["num_adapters"]: run["of_base"] for run in _runs(result, "saturated") if run["num_adapters"] and run["of_base"]}


def _runs(result: Json, kind: str) -> list[Json]:
    return [run for run in result["runs"] if run["kind"] == kind]


def _name(result: Json, run: Json) -> str:
    return f"{result['system']}, {_who(run['num_adapters'])}"


def _who(num_adapters: int) -> str:
    return f"{num_adapters:,} adapters" if num_adapters else "base model"


def _pair(spread: Mapping[str, float], factor: float, digits: int) -> str:
    return f"{spread['p50'] * factor:,.{digits}f} / {spread['p99'] * factor:,.{digits}f}" if spread else ""


def _hits(run: Json) -> str:
    rate = run["server"].get("adapter_hit_rate")
    return "" if rate is None else f"{rate:.2f}"


def _image(text: str, file: str | None) -> list[str]:
    return [f"![{text}]({file})", ""] if file else []
