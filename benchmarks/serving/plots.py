"""The plots of the report about serving: each function draws one file and returns its name. Knows no Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchmarks.serving.records import Json, base_rate, describe

# Told apart by people who see colours differently (Okabe and Ito), and by their markers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#767676"
# Of a pool, from the bottom.
POOL_PARTS = (
    ("KV", "#0072B2"),
    ("adapters in use", "#D55E00"),
    ("adapters, idle", "#F2B48C"),
    ("free", "#E6E6E6"),
)
PANEL_INCHES = (5.0, 3.2)

STYLE = Path(__file__).with_name("report.mplstyle")


@dataclass(frozen=True, slots=True)
class MemoryPlot:
    """A plot of the pool, and which run it shows."""

    file: str
    run: str


def plot_overhead(overheads: Mapping[str, Mapping[int, float]], docs: Path) -> str:
    """Throughput as a share of the base model's over the number of adapters, one line for each setting."""
    with _figure(docs / "serving_overhead.svg", 1) as (axes,):
        for number, (setting, shares) in enumerate(overheads.items()):
            points = dict(sorted(shares.items()))
            axes.plot(list(points), list(points.values()), label=setting, **_look(number))
            # The last one alone: the curves lie close together.
            x, y = list(points.items())[-1]
            axes.annotate(f"{y:.2f}", (x, y), (7, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1, label="base model")
        axes.margins(x=0.12)
        _from_zero(axes)
        axes.set(title="Cost of adapters, saturated", ylabel="requests/s, of the base model's")
        _adapter_axis(axes, {n for shares in overheads.values() for n in shares})
        axes.legend()
    return "serving_overhead.svg"


def plot_adapters(setting: str, results: Sequence[Json], docs: Path) -> str | None:
    """Saturated throughput over the number of adapters by system, and time to first token at each rate; None for one point."""
    curves = [(result["system"], _saturated(result)) for result in results if _saturated(result)]
    latencies = _latency_curves(results[0])
    if max((len(points) for _, points in curves), default=0) < 2:
        return None
    file = f"serving_{setting.lower()}_adapters.svg"
    with _figure(docs / file, 2 if latencies else 1, width=1.25) as panels:
        axes = panels[0]
        for number, (system, points) in enumerate(curves):
            # The first before those that lie upon it.
            axes.plot(list(points), list(points.values()), label=system, zorder=3 - 0.1 * number, **_look(number))
        base = base_rate(results[0]["runs"])
        if base:
            axes.axhline(base, color=GREY, linestyle="--", linewidth=1, label=f"{results[0]['system']}, base model")
        _label_points(axes, curves[0][1], ".1f")
        _from_zero(axes)
        axes.set(title=f"{setting}: throughput, saturated", ylabel="requests/s")
        _adapter_axis(axes, {n for _, points in curves for n in points})
        _legend_beside(axes)
        if latencies:
            _draw_latencies(panels[1], setting, latencies)
    return file


def plot_attainment(setting: str, results: Sequence[Json], docs: Path) -> str | None:
    """Attainment over the rate and over the burstiness of arrivals; None where each was measured at one point alone."""
    by_rate, by_cv = _attainment_curves(results, "rate", "cv"), _attainment_curves(results, "cv", "rate")
    panels_wanted = [(name, curves) for name, curves in (("rate", by_rate), ("cv", by_cv)) if curves]
    if not panels_wanted:
        return None
    file = f"serving_{setting.lower()}_attainment.svg"
    labels = {"rate": "requests/s asked", "cv": "cv of arrivals"}
    with _figure(docs / file, len(panels_wanted)) as panels:
        for axes, (name, curves) in zip(panels, panels_wanted, strict=True):
            for number, (label, points) in enumerate(curves.items()):
                axes.plot(list(points), list(points.values()), label=label, **_look(number))
            axes.set(
                title=f"{setting}, {_most_adapters(results):,} adapters: first token within 6 s",
                xlabel=labels[name],
                ylabel="share of requests",
                ylim=(0, 1.03),
            )
            _legend_beside(axes)
    return file


def plot_memory(setting: str, result: Json, docs: Path) -> MemoryPlot | None:
    """The pool by use over the run with the most adapters, the longest of those; None if it was not sampled."""
    sampled = [run for run in result["runs"] if run.get("load") and len(run["load"]["samples"]["t_s"]) > 3]
    if not sampled:
        return None
    run = max(sampled, key=lambda run: (run["num_adapters"], run["wall_s"]))
    samples = run["load"]["samples"]
    in_use = [pages - idle for pages, idle in zip(samples["adapter_pages"], samples["idle_adapter_pages"], strict=True)]
    parts = (samples["kv_pages"], in_use, samples["idle_adapter_pages"], samples["free_pages"])
    gib_per_page = result["pool"]["page_bytes"] / 2**30
    file = f"serving_{setting.lower()}_memory.svg"
    name = describe(run)
    with _figure(docs / file, 1, width=1.6) as (axes,):
        axes.stackplot(
            samples["t_s"],
            [[pages * gib_per_page for pages in part] for part in parts],
            labels=[label for label, _ in POOL_PARTS],
            colors=[color for _, color in POOL_PARTS],
            linewidth=0,
        )
        axes.set(title=f"{setting}: {name}", xlabel="time, s", ylabel="page pool, GiB")
        axes.margins(0)
        axes.grid(False)
        _legend_beside(axes, reverse=True)
    return MemoryPlot(file, name)


def _saturated(result: Json) -> dict[int, float]:
    found = {r["num_adapters"]: r["requests_per_s"] for r in result["runs"] if r["kind"] == "saturated" and r["num_adapters"]}
    return dict(sorted(found.items()))


def _latency_curves(result: Json) -> dict[str, dict[int, Mapping[str, float]]]:
    """By rate: time to first token over the number of adapters, for Poisson arrivals; rates with one point alone left out."""
    curves: dict[str, dict[int, Mapping[str, float]]] = {}
    for run in result["runs"]:
        if run["kind"] == "open_loop" and run["cv"] == 1 and run["num_adapters"] and run["ttft_s"]:
            curves.setdefault(f"{run['rate']:.1f}", {})[run["num_adapters"]] = run["ttft_s"]
    return {label: dict(sorted(points.items())) for label, points in curves.items() if len(points) > 1}


def _draw_latencies(axes: Axes, setting: str, curves: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    for number, (label, points) in enumerate(curves.items()):
        look = _look(number)
        axes.plot(list(points), [spread["p50"] * 1e3 for spread in points.values()], label=label, **look)
        look |= {"linestyle": ":", "markerfacecolor": "white"}
        axes.plot(list(points), [spread["p99"] * 1e3 for spread in points.values()], **look)
    axes.set(title=f"{setting}: time to first token, p50 and p99 (dotted)", ylabel="ms", yscale="log")
    # Curves that hardly differ are to look so.
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, 2 * high)
    _adapter_axis(axes, {n for points in curves.values() for n in points})
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _legend_beside(axes, "requests/s asked")


def _attainment_curves(results: Sequence[Json], over: str, fixed: str) -> dict[str, dict[float, float]]:
    """With the most adapters of each system: attainment over one of rate and cv, the other fixed; without curves of one point."""
    measured = [(r["system"], [run for run in r["runs"] if run["kind"] == "open_loop"]) for r in results]
    measured = [(system, runs) for system, runs in measured if runs]
    found: dict[str, dict[float, float]] = {}
    for system, runs in measured:
        most = max(run["num_adapters"] for run in runs)
        for run in (run for run in runs if run["num_adapters"] == most):
            held = f"cv {run['cv']:g}" if fixed == "cv" else f"{run['rate']:.1f}/s"
            label = f"{system}, {held}" if len(measured) > 1 else held
            found.setdefault(label, {})[run[over]] = run["slo_attainment"]
    return {label: dict(sorted(points.items())) for label, points in found.items() if len(points) > 1}


def _most_adapters(results: Sequence[Json]) -> int:
    found: list[int] = [run["num_adapters"] for result in results for run in result["runs"] if run["kind"] == "open_loop"]
    return max(found)


def _look(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def _label_points(axes: Axes, points: Mapping[int, float], form: str) -> None:
    """Their values, below them: the curves above hardly fall."""
    for x, y in points.items():
        axes.annotate(format(y, form), (x, y), (0, -12), textcoords="offset points", ha="center", fontsize=8)


def _from_zero(axes: Axes) -> None:
    """With room above all that is drawn."""
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _adapter_axis(axes: Axes, numbers: set[int]) -> None:
    """Logarithmic, with a tick at each number that was measured."""
    axes.set(xscale="log", xlabel="adapters")
    axes.set_xticks(sorted(numbers), [f"{n:,}" for n in sorted(numbers)])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend_beside(axes: Axes, title: str | None = None, reverse: bool = False) -> None:
    """Where it hides no curve."""
    axes.legend(title=title, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=reverse)


@contextmanager
def _figure(path: Path, num_panels: int, width: float = 1.0) -> Iterator[Sequence[Axes]]:
    """Panels side by side, written to the file at the end."""
    with matplotlib.style.context(STYLE):
        # Not pyplot's: that would keep every figure, and look for a screen.
        figure = Figure(figsize=(PANEL_INCHES[0] * num_panels * width, PANEL_INCHES[1]), layout="constrained")
        panels: list[Axes] = list(figure.subplots(1, num_panels, squeeze=False)[0])
        yield panels
        for axes in panels:
            if axes.get_yscale() == "linear":
                axes.yaxis.set_major_locator(MaxNLocator(6))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
