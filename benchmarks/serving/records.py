"""Result files as the report takes them: by setting and system, with repeated runs as one. Writes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

# Ours comes first; results of it are the ones that others are compared with.
OURS = "loraplane"
# What makes two runs of one result the same run.
_IDENTITY = ("kind", "num_adapters", "rate", "cv", "trace", "fixed", "alpha", "num_requests")


def by_setting(results: Mapping[str, Json]) -> dict[str, list[Json]]:
    """By setting, one result for each system, ours first. Results of one system are taken together: their runs are its runs.

    A run without the base model beside it, which rates were shares of, is not shown again if an earlier result has the same.
    `result` of a run is the name of its result: what is compared closely must be of one.
    """
    found: dict[str, dict[str, Json]] = {}
    for name, result in sorted(results.items()):
        systems = found.setdefault(setting_of(result), {})
        merged = _merge_repeated(result["runs"])
        base = base_rate(merged)
        # Beside the base model of the same result alone, whatever else there is.
        of_base = [{**run, "result": name, "of_base": run["requests_per_s"] / base if base else None} for run in merged]
        known = systems.setdefault(result["system"], {**result, "runs": []})
        seen = set(map(_identity, known["runs"]))
        known["runs"] = [*known["runs"], *(run for run in of_base if base or _identity(run) not in seen)]
    return {
        setting: sorted(systems.values(), key=lambda result: (result["system"] != OURS, result["system"]))
        for setting, systems in sorted(found.items())
    }


def setting_of(result: Json) -> str:
    """Its name; a model that is no setting is one of its own."""
    return str(result["setting"] or result["model"])


def runs_of(result: Json, kind: str) -> list[Json]:
    """Its runs of one kind."""
    return [run for run in result["runs"] if run["kind"] == kind]


def base_rate(runs: Sequence[Json]) -> float | None:
    """Saturated requests/s of the base model alone, if that was measured."""
    found = [run["requests_per_s"] for run in runs if run["kind"] == "saturated" and not run["num_adapters"]]
    return found[0] if found else None


def who(num_adapters: int) -> str:
    """Which adapters a run asked for, in few words."""
    return f"{num_adapters:,} adapters" if num_adapters else "base model"


def describe(run: Json) -> str:
    """A run in few words."""
    name = who(run["num_adapters"])
    match run["kind"]:
        case "saturated":
            return f"{name}, {run['num_requests']} requests at once"
        case "fixed":
            return f"{name}, {run['fixed']}"
        case "trace":
            return f"{name}, trace {run['trace']}"
    return f"{name}, {run['rate']:.1f} requests/s" + (f", cv {run['cv']:g}" if run["cv"] != 1 else "")


def _identity(run: Json) -> tuple[object, ...]:
    return tuple(run.get(name) for name in _IDENTITY)


def _merge_repeated(runs: Sequence[Json]) -> list[Json]:
    """Of runs that are the same, the one in the middle by throughput; `repeats` has the throughputs of all."""
    groups: dict[tuple[object, ...], list[Json]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    merged = []
    for group in groups.values():
        ordered = sorted(group, key=lambda run: float(run["requests_per_s"]))
        merged.append({**ordered[len(group) // 2], "repeats": [run["requests_per_s"] for run in ordered]})
    return merged
