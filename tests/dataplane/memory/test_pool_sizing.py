"""How many pages the pool gets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_store.geometry import BaseGeometry, LinearShape
from dataplane.config import DataPlaneConfig
from dataplane.memory import pool_sizing
from dataplane.memory.pool_sizing import PoolTooSmallError, choose_num_pages, fit_max_model_len, warn_of_large_adapters

# 2 layers of pages of 16 tokens, K and V of 8 elements in float32: 2048 bytes a page.
GEOMETRY = BaseGeometry("base", "f", "float32", 2, 1, 8, (LinearShape("q_proj", 8, 8),), 16)
CONFIG = DataPlaneConfig(Path("m"), Path("s"), (), max_num_seqs=4)
CPU = torch.device("cpu")


def no_step() -> int:
    """Sizing without a GPU must not run the model."""
    raise AssertionError("the model was run")


def _choose(config: DataPlaneConfig, max_model_len: int = 160) -> int:
    return choose_num_pages(config, GEOMETRY, max_model_len, CPU, no_step)


def test_a_number_of_pages_is_taken_as_given() -> None:
    assert _choose(replace(CONFIG, num_pages=5)) == 5


def test_bytes_give_the_whole_pages_that_fit_beside_the_one_for_padding() -> None:
    assert _choose(replace(CONFIG, pool_bytes=4 * 2048 + 2047)) == 3


def test_bytes_for_no_page_are_refused_with_the_numbers() -> None:
    message = r"--pool-bytes gives the pool 4095 bytes; a page of 16 tokens takes 2048, and at least 2 are needed"
    with pytest.raises(PoolTooSmallError, match=message):
        _choose(replace(CONFIG, pool_bytes=4095))


def test_pages_that_no_batch_could_fill_are_not_taken() -> None:
    assert _choose(replace(CONFIG, pool_bytes=1 << 30)) == 2 * 4 * 10


def test_short_requests_leave_room_for_an_adapter_of_the_largest_rank_each() -> None:
    geometry = replace(GEOMETRY, max_lora_rank=160)  # 320 rows of 8 elements in pages of 256
    config = replace(CONFIG, pool_bytes=1 << 30)
    assert choose_num_pages(config, geometry, 16, CPU, no_step) == 4 * (1 + 10)


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
    monkeypatch.setattr(pool_sizing, "_free_bytes_cpu", lambda: 4 * 2048 * 8)
    assert _choose(CONFIG) == 7


def test_a_containers_limit_is_below_the_machines_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("40000\n")
    monkeypatch.setattr(pool_sizing, "_CGROUP", tmp_path)
    assert pool_sizing._free_bytes_cpu() == 60000
    (tmp_path / "memory.max").write_text("max\n")
    assert pool_sizing._free_bytes_cpu() > 60000


def fake_device(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> torch.device:
    """A CUDA device of which nothing is asked but its memory."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    return torch.device("cuda")


def test_free_gpu_memory_is_shared_with_steps_and_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_device(monkeypatch, free=50 * 2048, total=100 * 2048)
    config = replace(CONFIG, gpu_memory_utilization=0.75)
    # Of the 50 pages 25 stay free, 10 are for steps, one is for padding.
    assert choose_num_pages(config, GEOMETRY, 160, device, lambda: 10 * 2048) == 14


def test_a_step_that_does_not_fit_is_told_with_the_options_that_make_it_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large() -> int:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    with pytest.raises(
        PoolTooSmallError, match=r"2048 tokens \(--token-budget\) of 4 requests \(--max-num-seqs\).*allocate 1 GiB"
    ):
        choose_num_pages(CONFIG, GEOMETRY, 160, fake_device(monkeypatch, 0, 0), too_large)
