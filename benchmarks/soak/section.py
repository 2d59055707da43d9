"""The part of the report about the soak. Measures nothing and judges nothing."""

from typing import Any

HEAD = """## A pool at its limit under churn

The whole service in one process, with more clients than the pool has room for and more adapters than fit beside their KV:
adapters are evicted for others all the time, and requests preempted when no page is left.
"""

SOAK = """In {dtype}: {seconds:.0f} s, {model} shape, {clients} clients that never stop, some of which leave early, {adapters}
adapters of ranks {rank_list} on every linear module, {pages:,} pages. Of these {used:.0%} were taken in the mean, {kv:.0%} by KV,
{in_use:.0%} by adapters in use and {idle:.0%} by idle ones; in {no_page:.1%} of the time not one was free, in {nothing:.1%} none
could be had by evicting an adapter either. {requests_finished:,} requests finished and {requests_aborted:,} were aborted;
{tokens:,} tokens in {steps:,} steps, {adapter_loads:,} adapters loaded and {adapter_evictions:,} evicted (among them some that
were there before), {preemptions:,} preemptions. At the end the books were {integrity}. {equal} of {pairs} requests answered token
for token what they answer alone.
"""

ROUNDING = """In half precision another batch is other rounding, and a token that leads by little may give way to the next: of
base-only requests, alone and in one batch, {base_equal} of {base_pairs} have the same tokens. So it is compared how far one token
leads over another in two runs that have said the same so far. That differs by {churned:.3f} at most where the soak's first token
differs, by up to {base:.3f} between base-only requests alone and in a batch, and by {wrong:.1f} in the median between an adapter
and the base model, as it would if an adapter's pages had been mixed up.
"""


def soak_section(result: dict[str, Any], *, has_head: bool = True) -> list[str]:
    """What benchmarks.churn saw. has_head: not the second result of two."""
    return [*([HEAD] if has_head else []), *(line for soak in result["soaks"] for line in _soak(soak))]


def _soak(result: dict[str, Any]) -> list[str]:
    churned, base, wrong = (result[name] for name in ("churned", "base_only", "wrong_adapter"))
    kv, in_use, idle = (result[f"mean_share_{name}"] for name in ("kv", "adapters_in_use", "adapters_idle"))
    shares = {"kv": kv, "in_use": in_use, "idle": idle, "used": kv + in_use + idle}
    full = {"no_page": result["share_no_page_free"], "nothing": result["share_no_page_free_or_idle"]}
    lines = [SOAK.format(**result | churned | shares | full, rank_list=", ".join(map(str, result["ranks"])))]
    if base is not None and wrong is not None:
        shifts = {"churned": churned["shift_at_difference_max"], "base": base["shift_max"], "wrong": wrong["shift_p50"]}
        lines.append(ROUNDING.format(base_equal=base["equal"], base_pairs=base["pairs"], **shifts))
    return lines
