"""A baseline's process takes its own options and hands on the others as they are."""

import pytest

from benchmarks.baselines.options import Baseline, BaselineOptions, parse_options

MODULE = "benchmarks.baselines.data_plane"


def test_options_of_the_real_process_are_handed_on() -> None:
    argv = ["--baseline", "no-unify", "--slot-modules", "q_proj,v_proj", "--slots", "4", "--model", "DIR", "--no-overlap"]
    expected = BaselineOptions(Baseline.NO_UNIFY, 4, ("q_proj", "v_proj"), ("--model", "DIR", "--no-overlap"))
    assert parse_options(MODULE, argv) == expected
    assert parse_options(MODULE, ["--baseline", "bmm"]).slot_modules == ()


@pytest.mark.parametrize(
    ("argv", "told"), [(["--slot-modules", "q_proj,x_proj"], "there is no 'x_proj'"), (["--slots", "0"], "--slots is 0")]
)
def test_what_is_wrong_is_named(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(MODULE, ["--baseline", "no-unify", *argv])
    assert told in capsys.readouterr().err
