"""A result file holds what is needed to judge it, in a form that can be read."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.result_file import write_result


def test_a_result_says_where_with_what_and_how_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--data-plane", "dataplane --no-overlap"])
    path = tmp_path / "new" / "result.json"
    write_result(path, {"rate": 1.5}, ("numpy",), device="a GPU", commit="abc")
    result = json.loads(path.read_text())
    assert (result["device"], result["commit"], result["rate"]) == ("a GPU", "abc", 1.5)
    assert set(result["versions"]) == {"python", "numpy"}
    # As it can be typed again.
    assert result["command"].endswith("--data-plane 'dataplane --no-overlap'")


def test_a_series_of_numbers_takes_one_line(tmp_path: Path) -> None:
    measured = {"t_s": [0.5, 1.0, -3e-9], "names": ["a", "b"], "none": [], "rows": [[1, 2], [3]], "text": "[1,  2]"}
    path = tmp_path / "result.json"
    write_result(path, measured, ())
    text = path.read_text()
    assert '"t_s": [0.5, 1.0, -3e-09]' in text
    assert {key: json.loads(text)[key] for key in measured} == measured | {"text": "[1, 2]"}
