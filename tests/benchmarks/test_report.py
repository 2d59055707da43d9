"""The page is written from whatever results are there, and registration is told with all that was measured of it."""

import json
from pathlib import Path

from benchmarks.report import write_page
from benchmarks.result_file import RESULTS

REGISTRATION = {
    "device": "an imagined processor",
    "versions": {"python": "3.12"},
    "commit": "0123456789ab",
    "date": "2000-01-01",
    "shape": "llama-7b",
    "count": 1000,
    "ranks": [8],
    "modules": ["q_proj"],
    "concurrency": 16,
    "image_mib": 16.0,
    "adapters_per_s": 103.4,
    "mib_per_s": 1655.2,
    "call_p50_ms": 149.7,
    "call_p99_ms": 332.4,
    "one_thread_ms": {"make_and_hash": 26.5, "write_and_sync": 8.6},
}


def test_registration_has_a_section_with_where_it_was_measured(tmp_path: Path) -> None:
    (tmp_path / "registration.json").write_text(json.dumps(REGISTRATION))
    write_page(tmp_path, tmp_path / "performance.md")
    text = " ".join((tmp_path / "performance.md").read_text().split())
    assert "## Registering adapters 1,000 adapters for a llama-7b shape, rank 8, 16 MiB each" in text
    assert "103 adapters a second, 1,655 MiB/s. A call takes 150 ms, p99 332." in text
    assert "*an imagined processor; python 3.12; commit 0123456789ab, 2000-01-01; `python -m benchmarks.registration`.*" in text


def test_loading_is_told_of_loads_alone(tmp_path: Path) -> None:
    load = {"median_ms": 0.5, "gb_per_s": 40.0, "back_to_back_gb_per_s": 50.0, "host_us": 100.0}
    row = {"shape": "llama-7b", "modules": 4, "rank": 8, "bytes": 1 << 24, "pages": 2, "plain_ms": 0.4}
    result = {
        **{name: REGISTRATION[name] for name in ("device", "versions", "commit", "date")},
        "pinned_gb_per_s": 55.0,
        "arena": {"bytes": 1 << 32, "pin_s": 1.5},
        "pool_bytes": 80 << 30,
        "rows": [{**row, "contiguous": load, "single_pages": load}],
    }
    (tmp_path / "adapters.json").write_text(json.dumps(result))
    write_page(tmp_path, tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    assert "| llama-7b, rank 8 | 16 | 2 | 0.40 | 0.50 | 40.0, 50.0 | 0.50 | 40.0, 50.0 | 100, 100 |" in text


def test_the_results_of_this_repository_can_be_read(tmp_path: Path) -> None:
    write_page(RESULTS, tmp_path / "performance.md")
    assert "## Serving under load" in (tmp_path / "performance.md").read_text()
