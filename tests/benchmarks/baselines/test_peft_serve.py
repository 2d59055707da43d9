"""transformers and peft under a small load on the CPU: all that is asked for is computed, by the adapter that was asked for."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.baselines.peft_model import PeftAdapters, PeftGenerator
from benchmarks.baselines.peft_serve import main
from benchmarks.model_shapes import ModelShape, write_config
from benchmarks.serving.outcome import PlannedRequest

SHAPE = ModelShape(
    "tiny",
    num_layers=1,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=64,
    max_model_len=256,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(SHAPE, tmp_path_factory.mktemp("model") / SHAPE.name, "float32")


def generator_of(model_dir: Path, num_adapters: int, num_loaded: int) -> PeftGenerator:
    adapters = PeftAdapters((4, 2), ("q_proj", "o_proj"), num_adapters, num_loaded)
    return PeftGenerator(model_dir, adapters, torch.device("cpu"), torch.float32, seed=0)


def test_an_adapter_is_copied_when_it_is_not_loaded_and_only_then(model_dir: Path) -> None:
    generator = generator_of(model_dir, num_adapters=6, num_loaded=4)
    # Two of each rank are loaded; numbers take the ranks in turn.
    for number, num_copies in ((0, 1), (2, 2), (1, 3), (0, 3), (4, 4), (0, 4), (2, 5), (1, 5)):
        (_,) = generator.generate([PlannedRequest(0, 0.0, str(number), 3, 1)], until_s=1e9)
        assert generator.num_copies == num_copies, f"adapter {number}"


def test_the_network_speaks_as_the_adapter_that_was_asked_for(model_dir: Path) -> None:
    generator = generator_of(model_dir, num_adapters=2, num_loaded=2)
    network = generator._network
    seen = []
    network.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, _, __: seen.append(None if module.disable_adapters else module.active_adapters)
    )
    for adapter in ("0", "", "1"):
        generator.generate([PlannedRequest(0, 0.0, adapter, 3, 1)], until_s=1e9)
    assert [names and network.peft_config[names[0]].r for names in seen] == [4, None, 2]


def test_a_run_writes_a_result_of_the_usual_form(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["--setting", "S2", "--model", str(model_dir), "--base-only", "--adapters", "3", "--lengths", "2,9"]
    assert (
        main([*arguments, "--requests", "6", "--dtype", "float32", "--device", "cpu", "--out", str(out), "--commit", "none"]) == 0
    )
    result = json.loads(out.read_text())
    assert (result["system"], result["setting"], result["model"]) == ("peft", "S2", "tiny")
    for run, num_adapters in zip(result["runs"], (0, 3), strict=True):
        assert (run["kind"], run["num_adapters"], run["num_completed"], run["errors"]) == ("saturated", num_adapters, 6, {})
        assert run["num_wrong_length"] == 0 and run["requests_per_s"] > 0
        assert 0 < run["batches"]["useful_share"] <= 1
    assert "done 6 of 6" in capsys.readouterr().out


def test_a_run_stops_when_its_time_is_up(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--setting", "S1", "--model", str(model_dir), "--adapters", "4", "--requests", "40", "--lengths", "40,41"]
    assert main([*arguments, "--dtype", "float32", "--device", "cpu", "--max-seconds", "0.05", "--out", str(out)]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert run["errors"]["TIME_IS_UP"]["count"] == 40 - run["num_completed"] > 0
