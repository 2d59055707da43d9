"""The part of the report about the LoRA kernels. Measures nothing and judges nothing."""

from typing import Any

from benchmarks.markdown import cell, table

KERNELS = """## The LoRA part of one step

What adapters add to the products of a step: down to their rank and up again, in all {layers} layers, in one CUDA graph, bfloat16.
Llama-7B shape with q, k, v and o unless the row says otherwise; random weights. 64 of 64 are 64 tokens, each of another adapter.
*target*: what ours is held against. *floor*: the bytes that must move, at the {device_tb_per_s:.2f} TB/s that a plain kernel
reached in the same run; *TB/s* is what ours reaches. *padded bmm*: `torch.bmm` over weights padded to the largest rank, which lie
ready; *loop*: one adapter after the other (both timed on {baseline_layers} layers and scaled). Milliseconds, medians.
"""


def kernels_section(result: dict[str, Any]) -> list[str]:
    """What benchmarks.kernels measured."""
    rows = [
        [
            row["name"],
            f"{row['median_ms']:.3f}",
            cell(row["target_ms"], "g"),
            f"{row['floor_ms']:.3f}",
            f"{row['tb_per_s']:.2f}",
            cell(row.get("padded_bmm_ms"), ".1f"),
            cell(row.get("adapter_loop_ms"), ".1f"),
        ]
        for row in result["rows"]
    ]
    return [KERNELS.format(**result), *table(["", "ours", "target", "floor", "TB/s", "padded bmm", "loop"], rows)]
