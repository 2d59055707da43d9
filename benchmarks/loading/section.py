"""The part of the report about adapters on their way to the device. Measures nothing and judges nothing."""

from typing import Any

from benchmarks.markdown import table

ADAPTERS = """## Loading an adapter

Loads from pinned host memory into a pool of {pool_gib:.0f} GiB, on an idle device, bfloat16: {shapes}.

- *plain* is torch's copy of the same bytes in one piece, *one run* a load into pages side by side, *single pages* one into pages
  of which no two are neighbours: milliseconds from the call to the end of the copy, medians.
- *GB/s* is of one load at a time, then of loads back to back. A plain copy of 1 GiB reaches {pinned_gb_per_s:.1f}.
- *host* is microseconds of the call that starts a load, all that it takes of the engine's loop, for one run and for single pages.
"""

STORE = """An image of {mib:.0f} MiB is read from the system's page cache into pinned memory, and its digest verified, in
{read_ms:.1f} ms ({read_gb_per_s:.2f} GB/s); the host cache with {threads} threads brings {fetches_per_s:.0f} a second.
{arena_gib:.0f} GiB of host memory are page-locked in {pin_s:.1f} s, at the start."""


def adapters_section(result: dict[str, Any]) -> list[str]:
    """The text and the table."""
    modules = {row["shape"]: row["modules"] for row in result["rows"]}
    shapes = "; ".join(f"{shape} with {count} modules" for shape, count in modules.items())
    head = ["", "MiB", "pages", "plain", "one run", "GB/s", "single pages", "GB/s", "host"]
    pool_gib = result["pool_bytes"] / 2**30
    lines = [ADAPTERS.format(pool_gib=pool_gib, shapes=shapes, **result), *table(head, [_row(row) for row in result["rows"]]), ""]
    store, arena = result.get("store"), result["arena"]
    if store is not None:
        arena_gib = arena["bytes"] / 2**30
        lines += [STORE.format(mib=store["bytes"] / 2**20, arena_gib=arena_gib, pin_s=arena["pin_s"], **store)]
    return lines


def _row(row: dict[str, Any]) -> list[str]:
    one_run, single = row["contiguous"], row["single_pages"]
    return [
        f"{row['shape']}, rank {row['rank']}",
        f"{row['bytes'] / 2**20:.0f}",
        f"{row['pages']}",
        f"{row['plain_ms']:.2f}",
        f"{one_run['median_ms']:.2f}",
        f"{one_run['gb_per_s']:.1f}, {one_run['back_to_back_gb_per_s']:.1f}",
        f"{single['median_ms']:.2f}",
        f"{single['gb_per_s']:.1f}, {single['back_to_back_gb_per_s']:.1f}",
        f"{one_run['host_us']:.0f}, {single['host_us']:.0f}",
    ]
