"""The part of the report about steps of the engine. Measures nothing."""

from typing import Any

from benchmarks.markdown import table
from benchmarks.steps.claims import claims

Json = dict[str, Any]

STEPS = """## A step of the engine

Decoding requests of {context} tokens, {dtype}, {shape} shape with adapters on q, k, v and o; random weights. A step is packed,
launched and sampled as in the service, one ahead of the device. *step / base*: over the same batch without adapters, measured
before and after in the same run. *LoRA*: its kernels alone. *host*: what the host does in a step; while that is below the step,
the device is the bound. Milliseconds, medians.
"""

PARTS = """Where the time of base-only steps goes. *GEMM* (all matrix products) and *attention*: alone, each as one CUDA graph.
*other*: norms, rotary positions, activations and gaps. *beside*: the step less the model's own time. *launch*: what the host
takes to launch a step, while the device computes another. *estimate*: GEMM, and keys and values read at {floor_tb_per_s} TB/s,
about what a plain kernel reaches; *TB/s* is what attention reaches.

The estimate is no bound: a step over it may be below 1, as attention over a large batch reads faster than that. *beside* is the
difference of two measurements: where the host costs nothing it may fall below 0.
"""

PROMPTS = """Steps in which a prompt joins requests that decode, and one prompt alone: M + N tokens are one token for each of M
requests, and N of a prompt. *host waits*: the share of a step in which the host waits for the device.
"""

HOST = """- The host in a step of {who}, {adapters}: {host_ms:.2f} ms, of which packing {pack_ms:.2f}, describing the step in
arrays {launch_arrays_ms:.2f}, their upload {launch_upload_ms:.2f}, the model's launch {launch_forward_ms:.2f} (attention's plan
{attention_plan_ms:.2f}; LoRA's, when the batch has changed, {lora_plan_ms:.2f}) and the sampler's {launch_sampling_ms:.2f}."""

MIXED_BATCH = """- Base-only requests beside others: {requests} requests of which half have adapters take {mixed_ms:.2f} ms. The
half with adapters takes {half_lora_ms:.2f} alone, as many more base-only rows cost {more_ms:.2f}: {excess:+.1%} against their
sum."""

WITHOUT_LORA = """- A batch of {most_adapters} without adapters takes {base_ms:.2f} ms, {excess:+.1%} against one where the
service has no LoRA at all, and {drawn_ms:.2f} ms when its tokens are drawn by temperature and top_p."""

STREAMING = """- While adapters of rank {loaded_rank} are loaded without a pause, {gb_per_s:.1f} GB/s, a step of {batch} requests,
{who}, takes {loading_ms:.2f} ms, and {quiet_ms:.2f} ms without such loads, before and after: {more:+.1%}."""

LIMITS = "Of the limits that these steps are held against, in [claims.py](../benchmarks/steps/claims.py),"

WIDE = """{wide_shape} shape, {batch} requests of as many adapters on all seven linear modules, ranks {ranks}.
"""

WIDE_LORA = """The adapters have {gigabytes:.1f} GB of weights, each read once a step: {read_ms:.2f} ms at {tb_per_s} TB/s.
Their kernels alone take {lora_ms:.2f} ms, {times_read:.2f} times that, and add {added_ms:.2f} ms to the step{overlap}.
{largest} the largest part, {share:.0%} of the step."""


def steps_section(result: Json) -> list[str]:
    """What benchmarks.engine measured."""
    lines = [STEPS.format(**result)]
    if "decode" in result:
        rows = result["decode"]
        lines += [*_decode(rows), "", PARTS.format(**result), *_parts(rows), ""]
        lines += [HOST.format(**row | {"who": _requests(row), "adapters": _adapters(row)}) for row in _most_adapters(rows)]
    if "mixed_batch" in result:
        lines += [_mixed_batch(result["mixed_batch"])]
    if "without_lora" in result and "base_only" in result:
        lines += [_without_lora(result)]
    for row in result.get("streaming", []):
        lines += [STREAMING.format(**row, who=_adapters(row), more=row["ratio"] - 1)]
    if "prompts" in result:
        lines += ["", PROMPTS, *_prompts(result["prompts"])]
    if "wide" in result:
        lines += ["", *_wide(result)]
    judged = claims(result)
    failed = [claim for claim in judged if not claim["holds"]]
    lines += ["", f"{LIMITS} {len(judged) - len(failed)} of {len(judged)} hold{'; over are:' if failed else '.'}", ""]
    return lines + [f"- {claim['what']}: {claim['value']:.3f}, limit {claim['limit']:g}" for claim in failed]


def _decode(rows: list[Json]) -> list[str]:
    body = [
        [
            f"{_requests(row)}, {_adapters(row)}",
            f"{row['step_ms']:.2f}",
            f"{row['times_base']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['lora_ms']:.2f}" if row["num_adapters"] else "",
            f"{row['host_ms']:.2f}",
        ]
        for row in rows
    ]
    return table(["", "step", "step / base", "tokens/s", "LoRA", "host"], body)


def _parts(rows: list[Json]) -> list[str]:
    columns = (
        "step_ms",
        "gemm_ms",
        "attention_ms",
        "other_device_ms",
        "beside_forward_ms",
        "launch_ms",
        "floor_ms",
        "times_floor",
    )
    body = [
        [_requests(row), *(f"{row[name]:.2f}" for name in columns), f"{row['attention_bytes'] / row['attention_ms'] / 1e9:.2f}"]
        for row in rows
        if not row["num_adapters"]
    ]
    return table(["", "step", "GEMM", "attention", "other", "beside", "launch", "estimate", "step / estimate", "TB/s"], body)


def _mixed_batch(row: Json) -> str:
    return MIXED_BATCH.format(**row, more_ms=row["base_ms"] - row["half_ms"])


def _without_lora(result: Json) -> str:
    base_ms, without_ms = result["base_only"]["step_ms"], result["without_lora"]["step_ms"]
    drawn_ms = result["base_only_drawn"]["step_ms"]
    excess = base_ms / without_ms - 1
    return WITHOUT_LORA.format(most_adapters=result["most_adapters"], base_ms=base_ms, excess=excess, drawn_ms=drawn_ms)


def _prompts(rows: list[Json]) -> list[str]:
    body = [
        [
            f"{row['decodes']} + {row['prompt_tokens']} tokens, {_adapters(row)}",
            f"{row['step_ms']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['launch_ms']:.2f}",
            f"{row['host_ms']:.2f}",
            f"{row['wait_share']:.0%}",
        ]
        for row in rows
    ]
    return table(["", "step", "tokens/s", "launch", "host", "host waits"], body)


def _wide(result: Json) -> list[str]:
    base, lora = result["wide"]
    ranks = lora["adapters"].partition("ranks ")[2]
    columns = ("step_ms", "times_base", "gemm_ms", "attention_ms", "lora_ms", "other_device_ms", "beside_forward_ms", "host_ms")
    body = [[row["adapters"], *(f"{row[name]:.2f}" for name in columns)] for row in (base, lora)]
    head = ["adapters", "step", "step / base", "GEMM", "attention", "LoRA", "other", "beside", "host"]
    return [
        WIDE.format(**result, batch=lora["batch"], ranks=ranks),
        *table(head, body),
        "",
        explain_wide(base, lora, result["floor_tb_per_s"]),
    ]


def explain_wide(base: Json, lora: Json, tb_per_s: float) -> str:
    """In words: what the adapters cost, and why."""
    read_ms = lora["lora_bytes"] / tb_per_s / 1e9
    added_ms = lora["step_ms"] - base["step_ms"]
    hidden_ms = lora["lora_ms"] - added_ms
    overlap = ""
    if abs(hidden_ms) > 0.05 * lora["lora_ms"]:
        overlap = f", {abs(hidden_ms):.2f} ms " + (
            "less than alone, as they overlap others" if hidden_ms > 0 else "more than alone"
        )
    largest = max(_PART_NAMES, key=lambda part: float(lora[part]))
    return WIDE_LORA.format(
        gigabytes=lora["lora_bytes"] / 1e9,
        read_ms=read_ms,
        tb_per_s=tb_per_s,
        lora_ms=lora["lora_ms"],
        times_read=lora["lora_ms"] / read_ms,
        added_ms=added_ms,
        overlap=overlap,
        largest=_PART_NAMES[largest],
        share=lora[largest] / lora["step_ms"],
    )


_PART_NAMES = {
    "gemm_ms": "The base model's GEMMs are",
    "attention_ms": "Attention is",
    "lora_ms": "LoRA is",
    "other_device_ms": "What is neither GEMM, attention nor LoRA is",
}


def _most_adapters(rows: list[Json]) -> list[Json]:
    """The largest batch: its base-only step, and the one with the most adapters."""
    largest = [row for row in rows if row["batch"] == rows[-1]["batch"]]
    return [largest[0], max(largest, key=lambda row: int(row["num_adapters"]))]


def _requests(row: Json) -> str:
    return f"{row['batch']} request{'s' if row['batch'] > 1 else ''}"


def _adapters(row: Json) -> str:
    if "rank" in row:
        return f"{row['adapters']} adapters of rank {row['rank']}" if row["adapters"] else "base model"
    return f"adapters: {row['adapters']}" if row["num_adapters"] else "base model"
