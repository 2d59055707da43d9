"""Writes docs/performance.md from the result files: `make report`. Measures nothing and judges nothing."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.loading.section import adapters_section
from benchmarks.lora.section import kernels_section
from benchmarks.markdown import table
from benchmarks.result_file import RESULTS
from benchmarks.serving.section import serving_section
from benchmarks.soak.section import soak_section
from benchmarks.steps.section import steps_section

PAGE = RESULTS.parent.parent / "docs" / "performance.md"

HEAD = """# Performance

Written by `make report` from [benchmarks/results](../benchmarks/results); every table of ours says where, with what and from
which commit its numbers come. Ratios compare what ran in one and the same run, except those to other systems.
"""

CONTROL_PLANE = """## The control plane

{streams} streams from one client, a data plane that computes nothing and speaks the real protocol, and beside it a bare gRPC
streaming echo with the same client. The echo sends a message for each token; the service does so as long as it keeps up, and then
puts several tokens of a stream in one message. Client, control plane and data plane share the cores of the machine. The latency
is from the step that made a token to its arrival at the client, with a token for each stream made at the same moment, every
{latency_step_ms:g} ms.
"""

SCHEDULING = (
    "Scheduling takes {p50_ms:.2f} ms for each step's report (p99 {p99_ms:.2f}), {num_running} requests running and "
    "{num_waiting:,} waiting."
)

REGISTRATION = """## Registering adapters

{count:,} adapters for a {shape} shape, {ranks_named}, {image_mib:.0f} MiB each, {concurrency} calls at a time through the admin
RPC. The control plane draws the weights of each from its seed, packs and hashes them, and writes the image to a file and through
to the disk: {adapters_per_s:.0f} adapters a second, {mib_per_s:,.0f} MiB/s. A call takes {call_p50_ms:.0f} ms, p99
{call_p99_ms:.0f}. Of an adapter alone, in one thread, drawing, packing and hashing take {make_and_hash:.0f} ms and writing
{write_and_sync:.0f}."""


def main() -> None:
    """Writes the page from the results that are there."""
    write_page(RESULTS, PAGE)


def write_page(results: Path, page: Path) -> None:
    """From all results in a directory; plots go beside the page."""
    sections = [HEAD]
    serving = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("serving_*.json"))}
    if serving:
        sections.append("\n".join(serving_section(serving, page.parent, _source)))
    for name, write in SECTIONS.items():
        path = results / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            sections.append("\n".join([*write(result), "", _source(name, result)]) + "\n")
    page.write_text("\n".join(sections))


def _control_plane(result: dict[str, Any]) -> list[str]:
    pairs = [
        ("messages/s, one token each", "messages_per_s", "echo", "service_unmerged"),
        ("tokens/s, as many in a message as there are", "tokens_per_s", "echo", "service_merging"),
        ("latency of a token, p50, ms", "latency_p50_ms", "echo_latency", "service_latency"),
        ("latency of a token, p99, ms", "latency_p99_ms", "echo_latency", "service_latency"),
    ]
    rows = []
    for name, figure, echo, service in pairs:
        ours, bare = result[service][figure], result[echo][figure]
        rows.append([name, f"{bare:,.1f}", f"{ours:,.1f}", f"{ours / bare:.2f}"])
    scheduling = result["scheduling"]
    return [
        CONTROL_PLANE.format(**result),
        *table(["", "bare echo", "service", "ratio"], rows),
        "",
        SCHEDULING.format(**scheduling),
    ]


def _registration(result: dict[str, Any]) -> list[str]:
    ranks = f"rank{'s' if len(result['ranks']) > 1 else ''} {', '.join(map(str, result['ranks']))}"
    return [REGISTRATION.format(**result, **result["one_thread_ms"], ranks_named=ranks)]


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "kernels": kernels_section,
    "engine": steps_section,
    "adapters": adapters_section,
    "churn": soak_section,
    "churn_float32": partial(soak_section, has_head=False),
    "control_plane": _control_plane,
    "registration": _registration,
}


def _source(name: str, result: dict[str, Any]) -> str:
    """Where a result comes from, and what is missing from it."""
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    command = result.get("command", f"python -m benchmarks.{name}")
    source = f"*{result['device']}; {versions}; commit {result['commit']}, {result['date'][:10]}; `{command}`.*"
    failed = [f"{part} ({error.splitlines()[0]})" for part, error in result.get("failed", {}).items()]
    return source + (f"\n\nNot measured, as it failed: {'; '.join(failed)}." if failed else "")


if __name__ == "__main__":
    main()
