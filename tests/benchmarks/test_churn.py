"""The soak in small: seconds of churn through a pool that is full now and then, and requests that answer as they do alone."""

import asyncio
from dataclasses import replace
from pathlib import Path

from benchmarks.churn import SOAKS, run


def test_a_full_pool_under_churn_loses_no_page_and_changes_no_token(tmp_path: Path) -> None:
    soak = replace(SOAKS["tiny"], num_adapters=24, max_output_tokens=60, num_pages=60, max_alone_tokens=200)
    measured = asyncio.run(run(soak, tmp_path, "cpu", "float32", seconds=1.5))
    assert measured["holds"], measured
    for count in ("requests_finished", "adapter_loads", "adapter_evictions"):
        assert measured[count], (count, measured)
