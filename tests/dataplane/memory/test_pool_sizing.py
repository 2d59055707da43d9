"""How many pages the pool gets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_store.geometry import BaseGeometry, LinearShape
from dataplane.config import DataPlaneConfig
from dataplane.memory import pool_sizing
from dataplane.memory.pool_sizing import PoolTooSmallError, choose_num_pages, fit_max_model_len, warn_of_large_adapters
from dataplane.model.step_inputs import StepInputs

# 2 layers of pages of 16 tokens, K and V of 8 elements in float32: 2048 bytes a page.
GEOMETRY = BaseGeometry("base", "f", "float32", 2, 1, 8, (LinearShape("q_proj", 8, 8),), 16)
CONFIG = DataPlaneConfig(Path("m"), Path("s"), (), max_num_seqs=4)
CPU = torch.device("cpu")


class NoModel:
    """Sizing without a GPU must not run the model."""

    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was run")


def _choose(config: DataPlaneConfig, max_model_len: int = 160) -> int:
    return choose_num_pages(config, GEOMETRY, max_model_len, NoModel(), CPU)


def test_a_number_of_pages_is_taken_as_given() -> None:
    assert _choose(replace(CONFIG, num_pages=5)) == 5


def test_bytes_give_the_whole_pages_that_fit() -> None:
    assert _choose(replace(CONFIG, pool_bytes=3 * 2048 + 2047)) == 3


def test_bytes_below_a_page_are_refused_with_the_numbers() -> None:
    with pytest.raises(PoolTooSmallError, match=r"--pool-bytes gives the pool 2047 bytes; one page of 16 tokens takes 2048"):
        _choose(replace(CONFIG, pool_bytes=2047))


def test_pages_that_no_batch_could_fill_are_not_taken() -> None:
    assert _choose(replace(CONFIG, pool_bytes=1 << 30)) == 2 * 4 * 10


def test_a_length_that_was_asked_for_and_never_fits_is_refused_with_the_numbers() -> None:
    config = replace(CONFIG, num_pages=9, max_model_len=160)
    message = (
        r"a request of 160 tokens takes 10 pages of the pool, which has 9; give the pool more, or set --max-model-len 144 or less"
    )
    with pytest.raises(PoolTooSmallError, match=message):
        fit_max_model_len(config, GEOMETRY, 160, 9)
    assert fit_max_model_len(config, GEOMETRY, 160, 10) == 160


def test_a_length_that_follows_from_the_model_is_cut_to_the_pool_and_said(caplog: pytest.LogCaptureFixture) -> None:
    assert fit_max_model_len(replace(CONFIG, num_pages=1), GEOMETRY, 160, 1) == 16
    assert "requests are limited to 16 tokens" in caplog.text


def test_a_pool_without_room_for_the_largest_adapter_is_said(caplog: pytest.LogCaptureFixture) -> None:
    # A page holds 256 elements: 32 rows of 8, and rank 16 has as many.
    warn_of_large_adapters(GEOMETRY, 2)
    assert caplog.text == ""
    warn_of_large_adapters(GEOMETRY, 1)
    assert "an adapter of rank 16 (--max-lora-rank) on every module takes 1 pages" in caplog.text


def test_free_memory_sizes_the_pool_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_sizing, "_free_bytes_cpu", lambda: 4 * 2048 * 7)
    assert _choose(CONFIG) == 7


def test_a_containers_limit_is_below_the_machines_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("40000\n")
    monkeypatch.setattr(pool_sizing, "_CGROUP", tmp_path)
    assert pool_sizing._free_bytes_cpu() == 60000
    (tmp_path / "memory.max").write_text("max\n")
    assert pool_sizing._free_bytes_cpu() > 60000


@pytest.mark.gpu
def test_free_gpu_memory_leaves_room_for_the_largest_step() -> None:
    class Greedy:
        """Needs 1 GiB in its step."""

        def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
            return torch.zeros(len(inputs.logits_rows), 100, device="cuda")

    device = torch.device("cuda")
    torch.cuda.empty_cache()  # what earlier tests left in torch's cache counts as free for the pool
    free, total = torch.cuda.mem_get_info(device)
    config = replace(CONFIG, gpu_memory_utilization=0.5, max_num_seqs=64, token_budget=1 << 17)
    num_pages = choose_num_pages(config, replace(GEOMETRY, num_layers=2000), 1 << 16, Greedy(), device)
    assert num_pages * replace(GEOMETRY, num_layers=2000).page_bytes <= free - total * 0.5 - (1 << 30)
