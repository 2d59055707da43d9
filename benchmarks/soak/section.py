"""The part of the report about the soak. Measures nothing and judges nothing."""

from typing import Any

HEAD = """## A full pool under churn
"""

SOAK = """{seconds:.0f} s of the whole service in one process, {model} shape, {dtype}, {clients} clients that never stop: a pool
of {pages:,} pages and {adapters} adapters of ranks {rank_list} on every linear module, some clients leave early.
{requests_finished:,} requests finished and {requests_aborted:,} were aborted; {tokens:,} tokens in {steps:,} steps,
{adapter_loads:,} adapters loaded and {adapter_evictions:,} evicted, {preemptions:,} preemptions. No page was free in
{share_no_page_free:.0%} of the time, and none could be had by evicting an adapter in {share_no_page_free_or_idle:.0%}. At the
end the books were {integrity}. {equal} of {pairs} requests answered token for token what they answer alone.
"""

OTHERS = """Two runs that have said the same so far differ in how far one token leads over another: by {churned:.3f} at most
where a first token differs, by up to {base:.3f} between base-only requests alone and in a batch, and by {wrong:.1f} in the
median between an adapter and the base model.
"""


def soak_section(result: dict[str, Any], *, has_head: bool = True) -> list[str]:
    """What benchmarks.churn saw. has_head: not the second result of two."""
    return [*([HEAD] if has_head else []), *(line for soak in result["soaks"] for line in _soak(soak))]


def _soak(result: dict[str, Any]) -> list[str]:
    churned, base, wrong = (result[name] for name in ("churned", "base_only", "wrong_adapter"))
    lines = [SOAK.format(**result | churned, rank_list=", ".join(map(str, result["ranks"])))]
    if base is not None and wrong is not None:
        shifts = {"churned": churned["shift_at_difference_max"], "base": base["shift_max"], "wrong": wrong["shift_p50"]}
        lines.append(OTHERS.format(**shifts))
    return lines
