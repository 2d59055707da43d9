"""A result file holds what is needed to judge it, in a form that can be read."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.result_file import ResultFile, write_result


def test_a_result_says_where_with_what_and_how_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--out", "/tmp/x", "--data-plane", "dataplane --no-overlap", "--commit=abc"])
    path = tmp_path / "new" / "result.json"
    write_result(path, {"rate": 1.5}, ("numpy", "no-such-package"), device="a GPU", commit="abc")
    result = json.loads(path.read_text())
    assert (result["device"], result["commit"], result["rate"]) == ("a GPU", "abc", 1.5)
    assert set(result["versions"]) == {"python", "numpy"}
    # As it can be typed again, wherever the result is to go.
    assert result["command"].endswith(" --data-plane 'dataplane --no-overlap'") and "/tmp" not in result["command"]


@pytest.mark.parametrize("secret", [["--token", "hush"], ["--token=hush"], ["--openai-extra", '{"key": "hush"}']])
def test_what_may_be_a_secret_is_in_no_result(secret: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--target", "x", *secret, "--adapters", "5"])
    write_result(tmp_path / "result.json", {}, ())
    text = (tmp_path / "result.json").read_text()
    assert "hush" not in text and "--target x --adapters 5" in text


def test_a_series_of_numbers_takes_one_line(tmp_path: Path) -> None:
    measured = {"t_s": [0.5, 1.0, -3e-9], "names": ["a", "b"], "none": [], "rows": [[1, 2], [3]], "text": "[1,  2]"}
    path = tmp_path / "result.json"
    write_result(path, measured, ())
    text = path.read_text()
    assert '"t_s": [0.5, 1.0, -3e-09]' in text
    assert {key: json.loads(text)[key] for key in measured} == measured | {"text": "[1, 2]"}


def test_what_was_measured_stands_in_the_file_whatever_fails_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    result = ResultFile(path, (), commit="abc")

    def fail() -> dict[str, object]:
        raise ValueError("no room")

    assert result.add("first", lambda: {"first": 1})
    assert json.loads(path.read_text())["first"] == 1
    assert not result.add("second", fail)
    assert result.add("third", lambda: {"third": 3})
    written = json.loads(path.read_text())
    assert (written["first"], written["third"], written["failed"]) == (1, 3, {"second": "ValueError: no room"})
    assert "ValueError: no room" in capsys.readouterr().err
