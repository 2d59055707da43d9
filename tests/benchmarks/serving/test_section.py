"""The report says what result files say, and no more. The numbers here were never measured."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.section import serving_section

Json = dict[str, Any]


@pytest.fixture(scope="module")
def fabricated() -> Any:
    """The module beside this one; tests are no packages."""
    spec = importlib.util.spec_from_file_location("fabricated", Path(__file__).with_name("fabricated.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(results: dict[str, Json], docs: Path) -> str:
    return "\n".join(serving_section(results, docs, lambda name, result: f"*source of {name}: {result['device']}*"))


def row_of(page: str, name: str, number: int = 0) -> list[str]:
    """The cells of the number-th row with that name."""
    return [line.strip("| ").split(" | ")[1:] for line in page.splitlines() if line.startswith(f"| {name} |")][number]


def test_tables_hold_what_was_measured_and_ratios_of_the_same_run(fabricated: Any, tmp_path: Path) -> None:
    page = report(fabricated.results(), tmp_path)
    assert row_of(page, "loraplane, 1,000 adapters") == [
        *("32.50", "0.956", "", "8,450", "7.0 / 21.0", "0.08 / 0.24", "20.0 / 60.0", "1,500", "0.75", "0.4 / 1.2"),
        "398 of 400",
    ]
    # No base model beside it: no share of one; but one of ours.
    assert row_of(page, "loraplane-bmm, 100 adapters")[:3] == ["6.77", "", "0.20"]
    assert re.search(r"^- loraplane-bmm: the same .*`torch.bmm`.*; a pool of 70 GiB; a host cache of 4 GiB;", page, re.MULTILINE)
    assert row_of(page, "loraplane, 5 adapters", 1)[:6] == ["15.0 (50%)", "1", "14.70", "30 / 90", "20.0 / 60.0", "7.0 / 21.0"]
    assert page.index("### S1") < page.index("### S2")


def test_every_result_says_where_it_comes_from(fabricated: Any, tmp_path: Path) -> None:
    results = fabricated.results()
    page = report(results, tmp_path)
    assert sorted(re.findall(r"\*source of (\S+): an imagined GPU\*", page)) == sorted(results)


def test_every_plot_that_the_page_shows_was_drawn(fabricated: Any, tmp_path: Path) -> None:
    page = report(fabricated.results(), tmp_path)
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert sorted(shown) == sorted(path.name for path in tmp_path.iterdir())
    assert {name.rsplit("_", 1)[1] for name in shown} == {"overhead.svg", "adapters.svg", "attainment.svg", "memory.svg"}
    for name in shown:
        assert ET.parse(tmp_path / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_numbers_make_the_same_files(fabricated: Any, tmp_path: Path) -> None:
    texts = []
    for name in ("first", "second"):
        report(fabricated.results(), tmp_path / name)
        texts.append({path.name: path.read_text() for path in (tmp_path / name).iterdir()})
    assert texts[0] == texts[1]


def test_a_run_that_was_repeated_is_shown_by_the_one_in_the_middle(fabricated: Any, tmp_path: Path) -> None:
    page = report(fabricated.results(), tmp_path)
    # 4 * 4 ms after the start the last one was sent.
    assert row_of(page, "loraplane, 8 adapters, 64x128x256") == ["9,100", "80 / 240", "20.0 / 60.0", "16", "15.00", "3"]
    runs = [fabricated.run(n, rate) for rate in (30.0, 33.0, 32.0) for n in (0, 5)]
    page = report({"serving_loraplane_S1": fabricated.result("loraplane", "S1", runs)}, tmp_path)
    assert row_of(page, "loraplane, 5 adapters")[:2] == ["32.00", "1.000"]
    assert "loraplane, 5 adapters 30.00 to 33.00" in page


def test_what_was_measured_stands_beside_what_was_aimed_at(fabricated: Any, tmp_path: Path) -> None:
    page = report(fabricated.results(), tmp_path)
    assert row_of(page, "S1, 1,000 adapters: saturated, requests/s") == ["4.3", "32.5", "7.6", "30"]
    assert row_of(page, "S2, 8 adapters: fixed load 64x128x256, tokens/s") == ["3,590", "9,100", "2.5", "8,500"]
    assert "- S1, 1,000 adapters: saturated throughput, of the base model's: 0.956 (at least 0.9)" in page
    assert "over that with 5 at the same rate, at the worst of all rates: 1.331 (at most 1.3; missed)" in page
    # A shorter trace is another load.
    short = fabricated.result("loraplane", "S1", [fabricated.run(1000, 90.0, num_requests=50)])
    assert "vLLM" not in report({"serving_loraplane_S1": short}, tmp_path)


def test_limits_that_no_run_of_vllm_stands_beside_have_no_table(fabricated: Any, tmp_path: Path) -> None:
    at_rate = [
        fabricated.run(n, 14.0, kind="open_loop", rate=15.0, cv=1.0, ttft_s=fabricated.spread(ttft))
        for n, ttft in ((5, 0.02), (1000, 0.025))
    ]
    page = report({"serving_loraplane_S1": fabricated.result("loraplane", "S1", at_rate)}, tmp_path)
    assert "at the worst of all rates: 1.250 (at most 1.3)" in page
    assert "vLLM" not in page


def test_a_limit_compares_runs_of_one_result_alone(fabricated: Any, tmp_path: Path) -> None:
    run, result = fabricated.run, fabricated.result
    results = {
        "serving_loraplane_S1": result("loraplane", "S1", [run(0, 40.0), run(1000, 38.0)]),
        "serving_loraplane_S1_more": result("loraplane", "S1", [run(0, 50.0), run(5, 49.0)]),
    }
    assert "- S1, 1,000 adapters: saturated throughput, of the base model's: 0.950 (at least 0.9)" in report(results, tmp_path)


def test_runs_of_one_system_in_two_files_are_taken_together(fabricated: Any, tmp_path: Path) -> None:
    run, result = fabricated.run, fabricated.result
    results = {
        "serving_loraplane_S1": result("loraplane", "S1", [run(0, 40.0), run(5, 30.0)]),
        "serving_loraplane_S1_more": result("loraplane", "S1", [run(0, 50.0), run(100, 30.0)]),
    }
    page = report(results, tmp_path)
    # Each beside the base model of its own run.
    assert row_of(page, "loraplane, 5 adapters")[1] == "0.750"
    assert row_of(page, "loraplane, 100 adapters")[1] == "0.600"
    assert "What is compared" not in page


def test_a_run_that_gave_rates_their_measure_is_not_shown_twice(fabricated: Any, tmp_path: Path) -> None:
    run, result = fabricated.run, fabricated.result
    at_rate = run(5, 14.0, kind="open_loop", rate=15.0, rate_share=0.5, cv=1.0)
    results = {
        "serving_loraplane_S1": result("loraplane", "S1", [run(0, 40.0), run(5, 30.0)]),
        "serving_loraplane_S1_rates": result("loraplane", "S1", [run(5, 31.0), run(100, 30.0), at_rate]),
    }
    page = report(results, tmp_path)
    assert row_of(page, "loraplane, 5 adapters")[0] == "30.00" and "31.00" not in page
    assert row_of(page, "loraplane, 100 adapters")[0] == "30.00"
    assert row_of(page, "loraplane, 5 adapters", 1)[0] == "15.0 (50%)"


def test_a_run_without_success_and_a_server_that_says_nothing_have_empty_cells(fabricated: Any, tmp_path: Path) -> None:
    failed = fabricated.run(5, 0.0, load=False, num_completed=0, ttft_s={}, itl_s={}, e2e_s={}, server={})
    page = report({"serving_vllm_S1": fabricated.result("vllm", "S1", [failed])}, tmp_path)
    assert row_of(page, "vllm, 5 adapters") == ["0.00", "", "0", "", "", "", "", "", "", "0 of 400"]
    assert list(tmp_path.iterdir()) == []
