"""What the numbers of a run are held against. Measures nothing."""

from collections.abc import Iterator
from typing import Any

Claim = dict[str, Any]

MAX_ESTIMATE_RATIO = 1.25
# A step of half a batch with adapters and half without, over what its halves take: within what two runs of the same differ by.
MAX_MIXED_EXCESS = 0.02
MAX_DISABLED_RATIO = 1.01
MAX_LOADING_RATIO = 1.05

# By adapters and requests: the most that a step may take of the base model's.
_MAX_TIMES_BASE = {("32 of rank 16", 32): 1.15, ("64 of rank 64", 64): 1.6}


def claims(measured: dict[str, Any]) -> list[Claim]:
    """Every claim that the run can decide: what is measured, its value, its limit, and whether it holds."""
    return list(_claims(measured))


def _claims(measured: dict[str, Any]) -> Iterator[Claim]:
    for row in measured.get("decode", []):
        limit = _MAX_TIMES_BASE.get((row["adapters"], row["batch"]))
        if limit is not None:
            yield _claim(f"{row['batch']} requests, {row['adapters']}: step over the base model's", row["times_base"], limit)
        if not row["num_adapters"]:
            yield _claim(f"{row['batch']} base-only requests: step over the estimate", row["times_floor"], MAX_ESTIMATE_RATIO)
    if "mixed_batch" in measured:
        row = measured["mixed_batch"]
        what = f"{row['requests']} requests, half base-only: step over that of the half with adapters and more base-only rows"
        yield _claim(what, row["mixed_ms"] / row["expected_ms"], 1 + MAX_MIXED_EXCESS)
    if "without_lora" in measured and "base_only" in measured:
        ratio = measured["base_only"]["step_ms"] / measured["without_lora"]["step_ms"]
        yield _claim("base-only requests: step over that of a model without LoRA", ratio, MAX_DISABLED_RATIO)
    for row in measured.get("streaming", []):
        what = f"{row['batch']} requests, adapters: {row['adapters']}: step while others are loaded over one while none are"
        yield _claim(what, row["ratio"], MAX_LOADING_RATIO)


def _claim(what: str, value: float, limit: float) -> Claim:
    return {"what": what, "value": value, "limit": limit, "holds": value <= limit}
