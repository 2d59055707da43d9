"""What a run measured, from the outcomes of its requests: rates, latencies, attainment, and how late the client was itself."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.percentiles import percentiles
from benchmarks.serving.outcome import Outcome, ServerTimings

# First token within this many seconds, as in the paper.
SLO_S = 6.0


def measure(outcomes: Sequence[Outcome], wall_s: float, slo_s: float = SLO_S) -> dict[str, Any]:
    """All metrics of one run. Rates count completed requests alone, over the whole time until the last stream ended.

    Latencies count from the planned time, and are those of completed requests; attainment and satisfaction are of all.
    """
    ok = [outcome for outcome in outcomes if outcome.is_ok]
    num_tokens = sum(outcome.num_tokens for outcome in ok)
    num_messages = sum(len(outcome.token_counts) for outcome in ok)
    return {
        "num_requests": len(outcomes),
        "num_completed": len(ok),
        "num_wrong_length": sum(outcome.num_tokens != outcome.request.output_tokens for outcome in ok),
        "num_distinct_adapters": len({outcome.request.adapter for outcome in outcomes} - {""}),
        "errors": errors(outcomes),
        "wall_s": wall_s,
        "requests_per_s": len(ok) / wall_s if wall_s else 0.0,
        "output_tokens_per_s": num_tokens / wall_s if wall_s else 0.0,
        "input_tokens": sum(outcome.request.input_tokens for outcome in ok),
        "output_tokens": num_tokens,
        "tokens_per_message": num_tokens / num_messages if num_messages else 0.0,
        "e2e_s": spread(outcome.e2e_s for outcome in ok),
        "ttft_s": spread(outcome.ttft_s for outcome in ok if outcome.ttft_s is not None),
        "tpot_s": spread(outcome.tpot_s for outcome in ok if outcome.tpot_s is not None),
        "itl_s": spread(gap for outcome in ok for gap in outcome.itl_s()),
        "slo_s": slo_s,
        "slo_attainment": _mean([_is_in_time(outcome, slo_s) for outcome in outcomes]),
        "satisfaction": _mean([_satisfaction(outcome, slo_s) for outcome in outcomes]),
        "late_s": spread(outcome.late_s for outcome in outcomes),
        "server": _server([o.server for o in ok if o.server], [o.server for o in ok if o.server and o.request.adapter]),
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; empty without values."""
    found = np.fromiter(values, dtype=np.float64)
    if not found.size:
        return {}
    p50, p90, p99 = percentiles(found, 50, 90, 99)
    return {"mean": float(found.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(found.max())}


def errors(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """By status: how many, and what the first of them was told."""
    failed = [outcome for outcome in outcomes if not outcome.is_ok]
    first = {outcome.status: outcome.detail for outcome in reversed(failed)}
    counts = Counter(outcome.status for outcome in failed)
    return {status: {"count": count, "first": first[status]} for status, count in counts.most_common()}


def _server(all_timings: Sequence[ServerTimings], adapter_timings: Sequence[ServerTimings]) -> dict[str, Any]:
    """What the service itself said; empty for one that says nothing. The adapter's part is of requests with an adapter."""
    if not all_timings:
        return {}
    # Exactly 0 where the adapter was there when the request joined the batch.
    waits = [timings.adapter_wait_s for timings in adapter_timings]
    return {
        "queue_s": spread(timings.queue_s for timings in all_timings),
        "adapter_wait_s": spread(waits),
        "adapter_hit_rate": _mean([wait == 0 for wait in waits]) if waits else None,
        "num_preemptions": sum(timings.num_preemptions for timings in all_timings),
    }


def _is_in_time(outcome: Outcome, slo_s: float) -> float:
    return float(outcome.is_ok and outcome.ttft_s is not None and outcome.ttft_s < slo_s)


def _satisfaction(outcome: Outcome, slo_s: float) -> float:
    if not _is_in_time(outcome, slo_s) or outcome.ttft_s is None:
        return 0.0
    return 1 - (outcome.ttft_s / slo_s) ** 2


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
