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


def test_the_results_of_this_repository_can_be_read(tmp_path: Path) -> None:
    write_page(RESULTS, tmp_path / "performance.md")
    assert "## Serving under load" in (tmp_path / "performance.md").read_text()
