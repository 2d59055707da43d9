"""The benchmark of steps in small, on the CPU: every section runs, the report can be written, and its own arithmetic is right."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import engine, report
from benchmarks.steps.claims import claims
from benchmarks.steps.loop import LoopTimes, StepLoop
from benchmarks.steps.section import steps_section
from benchmarks.steps.settings import SETTINGS


def test_every_section_is_measured_and_reported(tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    assert engine.main(["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    tiny = SETTINGS["tiny"]
    assert {row["batch"] for row in result["decode"]} == set(tiny.batches)
    for row in (*result["decode"], *result["wide"]):
        parts = row["gemm_ms"] + row["attention_ms"] + row["lora_ms"] + row["other_device_ms"]
        assert parts == pytest.approx(row["forward_ms"])
        assert (row["lora_ms"] > 0) == (row["num_adapters"] > 0)
        # The parts are of the step in the middle: keys and values, 2 heads of 16, in 2 layers.
        assert row["attention_bytes"] == row["batch"] * tiny.context * 2 * 32 * 4 * 2
    # 4 adapters of ranks 1 to 4 on all modules of 2 layers: 8 times 64, 64 times 64 + 32 twice, 64 + 160 three times.
    assert result["wide"][1]["lora_bytes"] == 4 * 2 * (1 + 2 + 3 + 4) * (2 * 128 + 2 * 96 + 3 * 224)
    report.write_page(tmp_path, tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "## A step of the engine" in page and "no bound" in page
    base = result["decode"][0]
    row = next(line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| 1 request |"))
    assert row[-2:] == [f"{base['times_floor']:.2f}", f"{base['attention_bytes'] / base['attention_ms'] / 1e9:.2f}"]


def test_loading_beside_steps_is_told_in_words() -> None:
    row = {"batch": 64, "adapters": "none", "num_adapters": 0, "loaded_rank": 64, "quiet_ms": 5.0, "loading_ms": 5.3}
    result = {"shape": "s", "context": 5, "dtype": "bfloat16", "streaming": [{**row, "gb_per_s": 50.0, "ratio": 1.06}]}
    lines = steps_section(result)
    assert any("base model, takes 5.30 ms" in line.replace("\n", " ") and "+6.0%" in line for line in lines)
    assert "1.060, limit 1.05" in lines[-1]


def test_claims_are_judged_by_what_was_measured() -> None:
    row = {"batch": 32, "adapters": "32 of rank 16", "num_adapters": 32, "times_base": 1.16}
    base = {"batch": 32, "adapters": "none", "num_adapters": 0, "times_base": 1.0, "times_floor": 1.25}
    mixed = {"requests": 64, "mixed_ms": 5.0, "expected_ms": 5.0}
    found = claims({"decode": [base, row], "mixed_batch": mixed})
    assert [claim["holds"] for claim in found] == [True, False, True]
    assert claims({}) == []


def test_a_section_that_fails_costs_no_other_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.count()
    turn = StepLoop.turn

    def fail_once(loop: StepLoop, times: LoopTimes | None = None) -> None:
        if next(turns) == 8:  # behind the batch of 1
            raise RuntimeError("the device has no more memory")
        turn(loop, times)

    monkeypatch.setattr(StepLoop, "turn", fail_once)
    out = tmp_path / "engine.json"
    argv = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--sections", "base_only,without_lora", "--out", str(out)]
    assert engine.main(argv) == 1
    result = json.loads(out.read_text())
    assert result["failed"] == {"base_only": "RuntimeError: the device has no more memory"}
    assert "without_lora" in result and "base_only" not in result
    report.write_page(tmp_path, tmp_path / "performance.md")
    assert "base_only (RuntimeError: the device has no more memory)" in (tmp_path / "performance.md").read_text()
