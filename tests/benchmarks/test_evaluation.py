"""The evaluation runs all that it is told to, whatever becomes of single parts, and says what became of each."""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks import evaluation, report
from benchmarks.evaluation_parts import PARTS, PIECES, SHORT, TINY, Part
from benchmarks.result_file import RESULTS
from benchmarks.serving.options import parse_options
from tests.waiting import block_until

# A benchmark as the evaluation sees one: writes what it was told to, and ends as it was told to. None lives longer than the test,
# which holds the lock that they wait for.
MODULE = """
import fcntl, signal, subprocess, sys
from pathlib import Path

what, out = sys.argv[1], Path(sys.argv[sys.argv.index("--out") + 1])
try:
    if what in ("leave", "stay"):
        # A plane as a benchmark starts it. Both hold that lock as long as one of them runs.
        alive = out.with_suffix(".alive").open("w")
        fcntl.flock(alive, fcntl.LOCK_EX)
        subprocess.Popen([sys.executable, __file__, "hang", "--out", "/dev/null"], process_group=0, pass_fds=[alive.fileno()])
    if what == "stay":
        signal.signal(signal.SIGINT, lambda *_: out.write_text("was told"))
    if what in ("hang", "stay"):
        out.write_text("started")
        with Path(__file__).with_name("lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
    out.write_text(" ".join(sys.argv[1:]))
    sys.exit(3 if what == "fail" else 0)
except KeyboardInterrupt:
    out.write_text("stopped in order")
    sys.exit(130)
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Part]]:
    """One that fails, one that ends, one that would take an hour and one that would not; and one that hangs, one that
    leaves behind what it started, and one that does not heed Ctrl-C either.
    """
    (tmp_path / "played.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [
        Part(SHORT, "broken", "broken.json", 0, "played fail"),
        Part(SHORT, "whole", "whole.json", 0, "played end"),
        Part(SHORT, "long", "long.json", 3600, "played end"),
        Part(SHORT, "last", "last.json", 0, "played end"),
        Part(TINY, "hanging", "hanging.json", 0, "played hang"),
        Part(TINY, "leaving", "leaving.json", 0, "played leave"),
        Part(TINY, "staying", "staying.json", 0, "played stay"),
    ]
    monkeypatch.setattr(evaluation, "PARTS", parts)
    # A shell's background job would ignore it, and so would the parts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield parts
    signal.signal(signal.SIGINT, before)


def states(printed: str) -> dict[str, str]:
    """By the names of parts, what the table says of them."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in printed.splitlines()}


def is_gone(alive: Path) -> bool:
    """Whether neither a part nor what it started runs, by the lock that they hold."""
    with alive.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextlib.contextmanager
def ctrl_c_when(path: Path, *texts: str) -> Iterator[None]:
    """Beside what runs in the context: Ctrl-C for this process when the file holds a text, and again for each further text."""

    def holds(text: str) -> bool:
        return path.exists() and path.read_text() == text

    def watch() -> None:
        for text in texts:
            block_until(partial(holds, text))
            os.kill(os.getpid(), signal.SIGINT)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        watching.join()


def test_a_part_that_fails_stops_no_other_and_is_told(
    parts: list[Part], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main(["--results", str(tmp_path), "--commit", "abc"]) == 1
    table = states(capfd.readouterr().out)
    assert list(table) == ["broken", "whole", "long", "last"]
    assert table["broken"].startswith("failed") and table["broken"].endswith("exit code 3")
    assert all(table[name].startswith("done") and table[name].endswith(f"{name}.json") for name in ("whole", "long", "last"))
    assert (tmp_path / "last.json").read_text() == f"end --out {tmp_path / 'last.json'} --commit abc"


def test_a_part_that_would_take_too_long_is_left_out_and_told(
    parts: list[Part], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [part.name for part in parts[1:4]]
    assert evaluation.main(["--parts", *names, "--max-seconds", "60", "--results", str(tmp_path)]) == 0
    table = states(capfd.readouterr().out)
    assert table["long"].startswith("left out") and "takes about 3600 s" in table["long"]
    assert table["last"].startswith("done") and not (tmp_path / "long.json").exists()


def test_a_part_that_hangs_is_stopped_in_order_when_the_time_is_up(parts: list[Part], tmp_path: Path) -> None:
    (outcome,) = evaluation.run_parts(parts[4:5], tmp_path, max_seconds=1.5)
    assert outcome.state == "failed" and outcome.why.startswith("cut off after")
    assert (tmp_path / "hanging.json").read_text() == "stopped in order"


def test_what_was_done_before_ctrl_c_is_told(parts: list[Part], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ctrl_c_when(tmp_path / "hanging.json", "started"):
        assert evaluation.main(["--parts", "whole", "hanging", "last", "--results", str(tmp_path)]) == 130
    table = states(capfd.readouterr().out)
    assert list(table) == ["whole", "hanging"]
    assert table["whole"].startswith("done") and table["hanging"].startswith("interrupted")
    assert (tmp_path / "hanging.json").read_text() == "stopped in order"


def test_nothing_that_a_part_started_outlives_it(parts: list[Part], tmp_path: Path) -> None:
    assert evaluation.main(["--parts", "leaving", "--results", str(tmp_path)]) == 0
    assert is_gone(tmp_path / "leaving.alive")


def test_a_part_that_does_not_stop_is_killed_with_all_that_it_started(
    parts: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "STOP_TIMEOUT_S", 0.1)
    with ctrl_c_when(tmp_path / "staying.json", "started"):
        assert evaluation.main(["--parts", "staying", "--results", str(tmp_path)]) == 130
    assert is_gone(tmp_path / "staying.alive")


def test_a_second_ctrl_c_waits_for_nothing(parts: list[Part], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ctrl_c_when(tmp_path / "staying.json", "started", "was told"):
        assert evaluation.main(["--parts", "staying", "--results", str(tmp_path)]) == 130
    assert is_gone(tmp_path / "staying.alive")
    assert states(capfd.readouterr().out)["staying"].startswith("interrupted")


def test_small_parts_overwrite_no_result_of_the_report(parts: list[Part], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluation.main(["--suite", TINY])
    assert "--results DIR" in capsys.readouterr().err


def test_results_have_names_of_their_own_that_the_report_knows() -> None:
    real = [part for part in PARTS if part.suite != TINY]
    assert len({part.result for part in real}) == len(real) and len({part.name for part in PARTS}) == len(PARTS)
    for part in real:
        assert part.result.startswith("serving_") or part.result.removesuffix(".json") in report.SECTIONS, part.name
    assert {part.result.removesuffix(".json") for part in real if part.suite == PIECES} < set(report.SECTIONS)


@pytest.mark.parametrize(
    "part", [part for part in PARTS if part.suite != TINY and (RESULTS / part.result).exists()], ids=lambda part: part.name
)
def test_a_part_is_the_command_that_made_the_result_in_the_report(part: Part) -> None:
    command, out = part.command(RESULTS)[:-2], part.command(RESULTS)[-2:]
    assert out == ["--out", str(RESULTS / part.result)]
    assert json.loads((RESULTS / part.result).read_text())["command"] == shlex.join(command)


@pytest.mark.parametrize("part", [part for part in PARTS if part.arguments.startswith("benchmarks.serve ")], ids=lambda p: p.name)
def test_a_part_is_a_command_that_the_benchmark_takes(part: Part) -> None:
    options = parse_options(shlex.split(part.arguments)[1:])
    assert options.runs and part.result.startswith(f"serving_{options.system}_{options.setting_name}")


def test_a_baseline_is_measured_on_a_cpu_and_reported(tmp_path: Path) -> None:
    assert evaluation.main(["--parts", "tiny-no-unify", "--results", str(tmp_path), "--commit", "abc"]) == 0
    result = json.loads((tmp_path / "serving_loraplane-no-unify_tiny.json").read_text())
    (run,) = result["runs"]
    assert run["num_completed"] == run["num_requests"] == 12 and run["num_distinct_adapters"] == 3
    # The command is one for anybody: not of where this one was to write.
    assert result["command"].startswith("python -m benchmarks.serve --setting tiny") and str(tmp_path) not in result["command"]
    report.write_page(tmp_path, tmp_path / "performance.md")
    assert "loraplane-no-unify, 3 adapters" in (tmp_path / "performance.md").read_text()
