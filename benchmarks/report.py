"""Writes docs/performance.md from the result files: `make report`. Measures nothing and judges nothing."""

import json
from collections.abc import Callable
from typing import Any

from benchmarks.loading.section import adapters_section
from benchmarks.markdown import table
from benchmarks.result_file import RESULTS
from benchmarks.serving.section import serving_section
from benchmarks.soak.section import soak_section
from benchmarks.steps.section import steps_section

PAGE = RESULTS.parent.parent / "docs" / "performance.md"

HEAD = """# Performance

Written by `make report` from [benchmarks/results](../benchmarks/results); every table says where, with what and from which
commit its numbers come. Ratios compare what ran in one and the same run.
"""

KERNELS = """## The LoRA part of one step

Shrink and expand of all {layers} layers in one CUDA graph, bfloat16. Llama-7B shape with q, k, v and o unless the row says
otherwise; random weights. *floor*: the bytes that must move, at the {device_tb_per_s:.2f} TB/s that a plain kernel reached in
the same run. *padded bmm*: `torch.bmm` over weights padded to the largest rank; *loop*: one adapter after the other (both timed
on {baseline_layers} layers and scaled). Milliseconds, medians.
"""

CONTROL_PLANE = """## The control plane

{streams} streams from one client, a data plane that computes nothing and speaks the real protocol, and beside it a bare gRPC
streaming echo with the same client. Client, control plane and data plane share the cores of the machine. The latency is from
the step that made a token to its arrival at the client, with a token for each stream made at the same moment, every
{latency_step_ms:g} ms.
"""

SCHEDULING = (
    "Scheduling takes {p50_ms:.2f} ms a report (p99 {p99_ms:.2f}), {num_running} requests running and {num_waiting} waiting."
)


def main() -> None:
    """Writes the page from the results that are there."""
    sections = [HEAD]
    serving = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("serving_*.json"))}
    if serving:
        sections.append("\n".join(serving_section(serving, PAGE.parent, _source)))
    for name, write in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            sections.append("\n".join([*write(result), "", _source(name, result)]) + "\n")
    PAGE.write_text("\n".join(sections))


def _kernels(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["name"],
            f"{row['median_ms']:.3f}",
            f"{row['target_ms']:g}" if row["target_ms"] else "",
            f"{row['floor_ms']:.3f}",
            f"{row['tb_per_s']:.2f}",
            f"{row['padded_bmm_ms']:.1f}",
            f"{row['adapter_loop_ms']:.1f}",
        ]
        for row in result["rows"]
    ]
    return [KERNELS.format(**result), *table(["", "ours", "target", "floor", "TB/s", "padded bmm", "loop"], rows)]


def _control_plane(result: dict[str, Any]) -> list[str]:
    pairs = [
        ("messages/s, one token each", "messages_per_s", "echo", "service_unmerged"),
        ("tokens/s, merged as the load asks", "tokens_per_s", "echo", "service_merging"),
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


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "kernels": _kernels,
    "engine": steps_section,
    "adapters": adapters_section,
    "churn": soak_section,
    "control_plane": _control_plane,
}


def _source(name: str, result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    command = result.get("command", f"python -m benchmarks.{name}")
    return f"*{result['device']}; {versions}; commit {result['commit']}, {result['date'][:10]}; `{command}`.*"


if __name__ == "__main__":
    main()
