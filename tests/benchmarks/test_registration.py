"""The benchmark of registration in small: a real control plane, however few adapters there are to register."""

import json
from pathlib import Path

import pytest

from benchmarks.registration import main


def test_one_adapter_is_enough_to_measure(tmp_path: Path) -> None:
    out = tmp_path / "registration.json"
    assert main(["--adapters", "1", "--shape", "tiny", "--dir", str(tmp_path), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["count"] == 1
    assert 0 < result["call_p50_ms"] == result["call_p99_ms"]
    assert result["one_thread_ms"]["make_and_hash"] > 0


def test_a_directory_that_is_not_there_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--adapters", "1", "--shape", "tiny", "--dir", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
