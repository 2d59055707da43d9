"""The whole benchmark, small: the real service on the CPU with the demo's model and adapters, measured through its API."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import main
from benchmarks.serving.bench import Bench, OnProgress
from benchmarks.serving.plan import RunPlan, Workload, draw_trace
from benchmarks.serving.service import RunningService, ServiceOptions, running_service
from benchmarks.serving.trace import TraceRequest, write_trace

DATA_PLANE = "dataplane --device cpu --dtype float32 --num-pages 300 --max-model-len 256"
LENGTHS = (4, 24)


@pytest.fixture(scope="module")
def service(repository: Path) -> Iterator[RunningService]:
    """A service that runs, with all adapters of the demo."""
    demo = repository / "examples" / "demo"
    with running_service(ServiceOptions(demo / "base", adapter_root=demo / "adapters", data_plane=DATA_PLANE)) as running:
        yield running


def result_of(path: Path, *argv: str) -> dict[str, Any]:
    """What a benchmark with these arguments writes."""
    assert main([*argv, "--out", str(path)]) == 0
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def check_laws(run: dict[str, Any]) -> None:
    """What holds of every run in which nothing failed."""
    assert run["num_completed"] == run["num_requests"] > 0
    assert (run["errors"], run["num_wrong_length"]) == ({}, 0)
    assert run["requests_per_s"] * run["wall_s"] == pytest.approx(run["num_completed"])
    assert run["output_tokens_per_s"] * run["wall_s"] == pytest.approx(run["output_tokens"])
    for figure in ("ttft_s", "e2e_s", "tpot_s", "itl_s", "late_s"):
        spread = run[figure]
        assert 0 <= spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"], figure
    for part in ("mean", "p50", "p90", "p99", "max"):
        assert run["ttft_s"][part] <= run["e2e_s"][part] <= run["wall_s"]
    assert 1 <= run["tokens_per_message"] <= LENGTHS[1]
    assert 0 <= run["satisfaction"] <= run["slo_attainment"] <= 1
    assert run["server"]["queue_s"]["max"] <= run["e2e_s"]["max"]


def test_a_service_of_its_own_is_measured_with_and_without_adapters(repository: Path, tmp_path: Path) -> None:
    demo = repository / "examples" / "demo"
    result = result_of(
        tmp_path / "result.json",
        *("--model", str(demo / "base"), "--data-plane", DATA_PLANE, "--adapter-dir", str(demo / "adapters")),
        *("--adapters", "3,11", "--base-only", "--requests", "24", "--lengths", "4,24", "--rates", "200%", "--duration", "0.3"),
        *("--clients", "2", "--warmup", "4", "--commit", "abc"),
    )
    assert result["registration"]["count"] == 11
    assert [(run["kind"], run["num_adapters"]) for run in result["runs"]] == [
        *(("saturated", n) for n in (0, 3, 11)),
        *(("open_loop", n) for n in (0, 3, 11)),
    ]
    for run in result["runs"]:
        check_laws(run)
        assert all(run["cpu_s"][plane] >= 0 for plane in ("control_plane", "data_plane")) and len(run["cpu_s"]["clients"]) == 2
        load = run["load"]
        assert load["num_steps"] > 0 and load["mean_step_s"] > 0 and load["engine_busy_share"] > 0
        columns = load["samples"]
        used = zip(columns["kv_pages"], columns["adapter_pages"], columns["free_pages"], strict=True)
        assert {sum(pages) for pages in used} == {result["pool"]["num_pages"]} == {300}
        assert run["num_distinct_adapters"] <= run["num_adapters"]
    trace = draw_trace(RunPlan(11), Workload(num_saturated=24, lengths=LENGTHS), None)
    saturated = result["runs"][2]
    assert saturated["output_tokens"] == sum(request.output_tokens for request in trace)
    assert saturated["input_tokens"] == sum(request.input_tokens for request in trace)
    assert saturated["num_distinct_adapters"] == len({request.adapter for request in trace})
    assert 0 <= saturated["server"]["adapter_hit_rate"] <= 1
    # A share of the lowest saturated rate with adapters, the same for all.
    slowest = min(run["requests_per_s"] for run in result["runs"][1:3])
    assert [run["rate"] for run in result["runs"][3:]] == [pytest.approx(2 * slowest)] * 3


def test_a_setting_is_served_with_random_weights_and_adapters(tmp_path: Path) -> None:
    result = result_of(
        tmp_path / "result.json",
        *("--setting", "tiny", "--data-plane", "dataplane --device cpu --num-pages 400", "--adapters", "60", "--requests", "40"),
        *("--lengths", "4,24", "--clients", "1", "--warmup", "8", "--state-dir", str(tmp_path / "state")),
    )
    assert (result["model"], result["ranks"], result["dtype"]) == ("tiny", [4, 8], "bfloat16")
    assert result["registration"]["count"] == 60
    (run,) = result["runs"]
    check_laws(run)
    assert run["load"]["samples"]["num_resident"][-1] > 0


def test_a_trace_is_replayed_on_a_service_that_runs(service: RunningService, tmp_path: Path) -> None:
    trace = [TraceRequest(0.01 * i, None, 0, 6, (5, 6, 7 + i)) for i in range(5)]
    write_trace(tmp_path / "real.jsonl", trace)
    target = ("--target", service.address, "--trace", str(tmp_path / "real.jsonl"), "--text", "--clients", "1", "--warmup", "4")
    (run,) = result_of(tmp_path / "result.json", *target)["runs"]
    check_laws(run)
    assert (run["kind"], run["trace"], run["output_tokens"], run["input_tokens"]) == ("trace", "real.jsonl", 30, 15)


def test_requests_that_are_refused_are_counted_by_status(
    service: RunningService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = [TraceRequest(0.0, None, 8, 4), TraceRequest(0.0, "nobody", 8, 4), TraceRequest(0.0, None, 300, 4)]
    write_trace(tmp_path / "bad.jsonl", trace)
    target = ("--target", service.address, "--trace", str(tmp_path / "bad.jsonl"), "--clients", "1", "--warmup", "4")
    (run,) = result_of(tmp_path / "result.json", *target)["runs"]
    assert {status: error["count"] for status, error in run["errors"].items()} == {"NOT_FOUND": 1, "INVALID_ARGUMENT": 1}
    assert (run["num_completed"], run["slo_attainment"]) == (1, pytest.approx(1 / 3))
    assert "'nobody'" in capsys.readouterr().out


def test_a_run_that_cannot_be_made_is_told_beside_those_that_were(service: RunningService, tmp_path: Path) -> None:
    write_trace(tmp_path / "bad.jsonl", [TraceRequest(0.0, 7, 8, 4)])
    write_trace(tmp_path / "good.jsonl", [TraceRequest(0.0, None, 8, 4)])
    traces = ("--trace", str(tmp_path / "bad.jsonl"), "--trace", str(tmp_path / "good.jsonl"))
    out = tmp_path / "result.json"
    assert main(["--target", service.address, *traces, "--clients", "1", "--warmup", "0", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [run["trace"] for run in result["runs"]] == ["good.jsonl"]
    assert result["failed"] == {"trace bad.jsonl": "BenchError: the trace asks for adapter number 7; there are 0, counted from 0"}


def test_what_an_interrupt_left_out_is_told(service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trace(tmp_path / "a.jsonl", [TraceRequest(0.0, None, 8, 4)])
    write_trace(tmp_path / "b.jsonl", [TraceRequest(0.0, None, 8, 4)])
    make_run = Bench.run

    async def run(bench: Bench, plan: RunPlan, on_progress: OnProgress) -> dict[str, Any]:
        if plan.trace == tmp_path / "b.jsonl":
            raise KeyboardInterrupt
        return await make_run(bench, plan, on_progress)

    monkeypatch.setattr(Bench, "run", run)
    traces = ("--trace", str(tmp_path / "a.jsonl"), "--trace", str(tmp_path / "b.jsonl"))
    out = tmp_path / "result.json"
    assert main(["--target", service.address, *traces, "--clients", "1", "--warmup", "0", "--out", str(out)]) == 130
    result = json.loads(out.read_text())
    assert [run["trace"] for run in result["runs"]] == ["a.jsonl"]
    assert result["failed"] == {"trace b.jsonl": "not reached"}


def test_a_failure_is_told_though_the_same_run_is_still_to_come(
    service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trace(tmp_path / "bad.jsonl", [TraceRequest(0.0, 7, 8, 4)])
    write_trace(tmp_path / "good.jsonl", [TraceRequest(0.0, None, 8, 4)])
    make_run = Bench.run
    made: list[RunPlan] = []

    async def run(bench: Bench, plan: RunPlan, on_progress: OnProgress) -> dict[str, Any]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(plan)
        return await make_run(bench, plan, on_progress)

    monkeypatch.setattr(Bench, "run", run)
    traces = ("--trace", str(tmp_path / "bad.jsonl"), "--trace", str(tmp_path / "good.jsonl"), "--repeat", "2")
    out = tmp_path / "result.json"
    assert main(["--target", service.address, *traces, "--clients", "1", "--warmup", "0", "--out", str(out)]) == 130
    failed = json.loads(out.read_text())["failed"]
    assert failed["trace good.jsonl"] == "not reached"
    assert failed["trace bad.jsonl"].startswith("BenchError: the trace asks for adapter number 7")


def test_more_adapters_than_there_are_are_refused(service: RunningService, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", service.address, "--adapters", "5"]) == 1
    assert "5 adapters are asked for, and there are 0" in capsys.readouterr().err
