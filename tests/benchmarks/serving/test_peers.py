"""Another server is laid beside this one: the same trace, the same metrics, from the command line to the result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.serve import main
from benchmarks.serving.plan import RunPlan, Workload, draw_trace

if TYPE_CHECKING:
    from tests.benchmarks.serving.conftest import OpenAiServer


def test_a_server_that_speaks_openais_api_gets_the_same_trace(
    openai_server: Callable[..., "OpenAiServer"], tmp_path: Path
) -> None:
    server = openai_server(tokens_per_chunk=3)
    out = tmp_path / "result.json"
    argv = ["--openai", server.url, "--base-model", "llama", "--adapter-name-template", "llama:{i}", "--system", "other"]
    argv += ["--setting-name", "S1", "--adapters", "5", "--base-only", "--requests", "12", "--lengths", "4,12", "--warmup", "2"]
    assert main([*argv, "--vocab-size", "50", "--clients", "1", "--device-name", "a GPU", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["system"], result["setting"], result["device"], result["model"]) == ("other", "S1", "a GPU", "llama")
    base, adapted = result["runs"]
    trace = draw_trace(RunPlan(5), Workload(num_saturated=12, lengths=(4, 12)), None)
    for run in (base, adapted):
        assert (run["num_completed"], run["num_wrong_length"], run["errors"]) == (12, 0, {})
        assert run["output_tokens"] == sum(request.output_tokens for request in trace)
        assert run["tokens_per_message"] > 1
        assert run["ttft_s"]["max"] <= run["e2e_s"]["max"] <= run["wall_s"]
        assert (run["server"], run["load"], run["late_s"]["p99"] >= 0) == ({}, None, True)
    bodies = [body for _, body in server.requests][2 + 12 :]
    asked = sorted((body["model"], len(body["prompt"]), body["max_tokens"]) for body in bodies)
    assert asked == sorted((f"llama:{r.adapter}", r.input_tokens, r.output_tokens) for r in trace)
    assert all(3 <= token_id < 50 for body in bodies for token_id in body["prompt"])


def test_a_server_without_an_adapter_is_told_before_the_first_run(
    openai_server: Callable[..., "OpenAiServer"], tmp_path: Path
) -> None:
    argv = ["--openai", openai_server().url, "--base-model", "llama", "--adapter-name-template", "unknown"]
    assert main([*argv, "--adapters", "2", "--clients", "1", "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
