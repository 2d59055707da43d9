"""Which runs are made, from the command line to their traces."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.serving.bench import Bench, BenchError, Server
from benchmarks.serving.clients import Clients
from benchmarks.serving.commands import with_options
from benchmarks.serving.options import Options, parse_options
from benchmarks.serving.plan import FixedLoad, Rate, RunPlan, Workload, draw_trace
from benchmarks.serving.trace import TraceRequest, write_trace


def parse(*argv: str) -> Options:
    return parse_options(argv)


def test_saturated_runs_come_first_and_the_base_model_before_adapters() -> None:
    options = parse("--setting", "S2", "--adapters", "5,100", "--base-only", "--rates", "80%,3", "--cvs", "1,4")
    saturated = [RunPlan(n) for n in (0, 5, 100)]
    at_rates = [RunPlan(n, rate, cv) for rate in (Rate(0.8, True), Rate(3.0)) for cv in (1.0, 4.0) for n in (0, 5, 100)]
    assert list(options.runs) == saturated + at_rates
    assert options.num_adapters == 100
    assert (options.adapters.ranks, options.adapters.count) == ((64, 32, 16, 8), 100)
    assert options.out.name == "serving_loraplane_S2.json"


def test_a_fixed_load_is_dealt_to_its_adapters_in_turn() -> None:
    options = parse("--setting", "S2", "--fixed", "64x128x256:8,3x5x7", "--repeat", "2")
    large, small = FixedLoad(64, 128, 256), FixedLoad(3, 5, 7)
    assert list(options.runs) == 2 * [RunPlan(8, fixed=large), RunPlan(0, fixed=small)]
    assert (options.num_adapters, options.runs[0].kind) == (8, "fixed")
    trace = draw_trace(options.runs[0], Workload(), None)
    assert {(r.at_s, r.input_tokens, r.output_tokens) for r in trace} == {(0.0, 128, 256)}
    assert [r.adapter for r in trace] == 8 * list(range(8))
    assert {r.adapter for r in draw_trace(options.runs[1], Workload(), None)} == {None}


def test_runs_without_a_rate_are_repeated_in_turn() -> None:
    options = parse("--setting", "S1", "--adapters", "5", "--base-only", "--rates", "80%", "--repeat", "3")
    assert [run.num_adapters for run in options.runs if run.rate is None] == [0, 5] * 3
    assert sum(run.rate is not None for run in options.runs) == 2


def test_adapters_may_be_left_to_come_when_they_are_needed() -> None:
    options = parse("--setting", "S1", "--adapters", "5", "--no-idle-prefetch")
    assert (options.system, options.idle_prefetch) == ("loraplane-no-prefetch", False)
    assert options.control_plane.split()[1:] == ["--max-waiting=65536", "--no-idle-prefetch"]
    assert options.out.name == "serving_loraplane-no-prefetch_S1.json"


def test_idle_prefetch_is_told_as_the_control_plane_has_it() -> None:
    options = parse("--setting", "S1", "--adapters", "5", "--control-plane", "controlplane --no-idle-prefetch")
    assert (options.system, options.idle_prefetch) == ("loraplane-no-prefetch", False)
    assert options.control_plane == "controlplane --no-idle-prefetch --max-waiting=65536"


def test_a_setting_is_served_with_random_weights_and_a_queue_that_refuses_nobody() -> None:
    options = parse("--setting", "S1", "--adapters", "5", "--data-plane", "dataplane --no-overlap")
    assert options.data_plane == "dataplane --no-overlap --load-format=dummy"
    assert options.control_plane == "controlplane --max-waiting=65536"
    assert parse("--model", ".", "--base-only").data_plane == "dataplane --load-format=auto"


def test_options_that_are_there_stay() -> None:
    assert with_options("dataplane --a=1 --b 2", {"--a": "3", "--b": "4", "--c": ""}) == "dataplane --a=1 --b 2 --c"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--base-only"], "one of --setting, --model, --target and --openai"),
        (["--setting", "S1", "--openai", "http://x", "--base-only"], "one of --setting, --model, --target and --openai"),
        (["--openai", "http://x", "--adapters", "3"], "--openai needs --base-model"),
        (["--setting", "S1"], "nothing to run: give --adapters, --base-only, --fixed or --trace"),
        (["--setting", "S1", "--base-only", "--rates", "0"], "a rate of 0; it must be above 0"),
        (["--setting", "S1", "--base-only", "--rates", "50%", "--no-saturated"], "leave --no-saturated out"),
        (["--setting", "S1", "--adapters", "five"], "five"),
        (["--setting", "S1", "--fixed", "64x128"], "a fixed load of '64x128'; it has the form REQUESTSxINPUTxOUTPUT"),
        (["--setting", "S1", "--base-only", "--lengths", "8"], "--lengths has 1 numbers; it takes two"),
        (
            ["--setting", "S1", "--trace", "x", "--fixed", "4x5x6"],
            "--trace replays what it holds and nothing else; leave --fixed out",
        ),
        (["--setting", "S1", "--trace", "x", "--rates", "5", "--base-only"], "leave --rates, --base-only out"),
        (["--target", "x:1", "--base-only", "--no-idle-prefetch"], "--no-idle-prefetch is for a service that is started here"),
    ],
)
def test_a_command_line_that_cannot_be_followed_is_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(argv)
    assert message in capsys.readouterr().err


def test_a_trace_is_replayed_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "real.jsonl"
    trace = (TraceRequest(0.0, "pirate", 3, 4), TraceRequest(1.0, 2, 3, 4))
    write_trace(path, trace)
    (plan,) = parse("--target", "x:1", "--adapters", "3", "--trace", str(path)).runs
    assert (plan.kind, plan.num_adapters) == ("trace", 3)
    assert draw_trace(plan, Workload(), None) == trace


def test_traces_are_repeated_in_turn() -> None:
    options = parse("--target", "x:1", "--trace", "a", "--trace", "b", "--repeat", "2")
    assert [str(run.trace) for run in options.runs] == ["a", "b", "a", "b"]


def test_a_share_is_of_a_saturated_run_and_names_of_adapters_there_are() -> None:
    class NoClients(Clients):
        def __init__(self) -> None:
            """Starts none: what is tested fails before anything is sent."""

    async def run(plan: RunPlan) -> None:
        await Bench(Server(["a", "b"], 100), NoClients(), Workload(num_saturated=50)).run(plan, lambda total, progress: None)

    with pytest.raises(BenchError, match="a rate of 80% needs a saturated run before it"):
        asyncio.run(run(RunPlan(2, Rate(0.8, True))))
    with pytest.raises(BenchError, match="the trace asks for adapter number 2; there are 2, counted from 0"):
        asyncio.run(run(RunPlan(3)))
