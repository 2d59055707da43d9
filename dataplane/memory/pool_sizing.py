"""How many pages the pool gets: as told, or as many as the memory holds that is free once the model has run its largest step.

Knows the model as something that can be run, and pages only by their size.
"""

import logging
import os
from pathlib import Path

import torch

from adapter_store.geometry import BaseGeometry
from adapter_store.packing import pack_rows
from dataplane.config import DataPlaneConfig
from dataplane.model.step_inputs import StepInputs
from dataplane.runner.model_runner import ForwardModel
from dataplane.runner.sampling import SamplingRow, sample
from protos.planes import EngineSampling

_log = logging.getLogger(__name__)

# Of the memory that is available on a machine without a GPU. Pages cost nothing there until they are first written.
CPU_MEMORY_SHARE = 0.25

_CGROUP = Path("/sys/fs/cgroup")


class PoolTooSmallError(Exception):
    """The pool does not hold what it must; the message has the numbers."""


def choose_num_pages(
    config: DataPlaneConfig, geometry: BaseGeometry, max_model_len: int, model: ForwardModel, device: torch.device
) -> int:
    """The number of pages.

    Raises:
        PoolTooSmallError: there is no room for a single request of any length.
    """
    if config.num_pages is not None:
        return config.num_pages
    if config.pool_bytes is not None:
        size_bytes, source = config.pool_bytes, "--pool-bytes"
    elif device.type == "cuda":
        size_bytes, source = _free_bytes_cuda(config, geometry, max_model_len, model, device), "free GPU memory"
    else:
        size_bytes, source = int(_free_bytes_cpu() * CPU_MEMORY_SHARE), "free memory"
    num_pages = size_bytes // geometry.page_bytes
    if num_pages < 1:
        raise PoolTooSmallError(
            f"{source} gives the pool {max(0, size_bytes)} bytes; one page of {geometry.page_tokens} tokens takes "
            f"{geometry.page_bytes}. Free memory, or serve a smaller model"
        )
    # More than every request at its longest, and as much again for adapters, would never be used.
    return min(num_pages, 2 * config.max_num_seqs * geometry.num_kv_pages(max_model_len))


def fit_max_model_len(config: DataPlaneConfig, geometry: BaseGeometry, max_model_len: int, num_pages: int) -> int:
    """The longest request that the pool can finish: `max_model_len`, or less where that was not asked for.

    Raises:
        PoolTooSmallError: a length was asked for that the whole pool does not hold.
    """
    largest = num_pages * geometry.page_tokens
    if max_model_len <= largest:
        return max_model_len
    num_needed = geometry.num_kv_pages(max_model_len)
    text = f"a request of {max_model_len} tokens takes {num_needed} pages of the pool, which has {num_pages}"
    if config.max_model_len is not None:
        raise PoolTooSmallError(f"{text}; give the pool more, or set --max-model-len {largest} or less")
    _log.warning("%s: requests are limited to %d tokens; give the pool more pages for longer ones", text, largest)
    return largest


def warn_of_large_adapters(geometry: BaseGeometry, num_pages: int) -> None:
    """Says so if the pool is too small for an adapter of the largest rank on all modules and one page of KV beside it."""
    ranks = {module.name: geometry.max_lora_rank for module in geometry.modules}
    num_needed = pack_rows(ranks, geometry).num_pages + 1
    if num_needed > num_pages:
        _log.warning(
            "an adapter of rank %d (--max-lora-rank) on every module takes %d pages and its request at least one more; the pool "
            "has %d, so requests for such an adapter are refused",
            geometry.max_lora_rank,
            num_needed - 1,
            num_pages,
        )


def _free_bytes_cuda(
    config: DataPlaneConfig, geometry: BaseGeometry, max_model_len: int, model: ForwardModel, device: torch.device
) -> int:
    peak = _measure_step_bytes(config, geometry, max_model_len, model, device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - peak - (1 - config.gpu_memory_utilization) * total)


@torch.inference_mode()
def _measure_step_bytes(
    config: DataPlaneConfig, geometry: BaseGeometry, max_model_len: int, model: ForwardModel, device: torch.device
) -> int:
    """Runs the largest step there can be, over a pool of one page that stands for all, and returns the most it allocated."""
    num_tokens = min(config.token_budget, max_model_len)
    pool = torch.zeros((geometry.num_layers, 1, geometry.page_elems), dtype=getattr(torch, geometry.dtype), device=device)
    num_requests = max(1, config.token_budget // num_tokens)
    steps = torch.arange(num_tokens, device=device).repeat(num_requests)
    inputs = StepInputs(
        token_ids=torch.zeros_like(steps),
        positions=steps + (max_model_len - num_tokens),
        slots=steps % geometry.page_tokens,
        query_starts=tuple(range(0, num_requests * num_tokens + 1, num_tokens)),
        context_lens=(max_model_len,) * num_requests,
        page_tables=((0,) * geometry.num_kv_pages(max_model_len),) * num_requests,
        logits_rows=torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device),
        adapter_index=(-1,) * len(steps),
        adapters=(),
    )
    row = SamplingRow(EngineSampling(max_tokens=1, temperature=1.0, top_p=0.9), (0,), 1)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    sample(model.forward(inputs, pool), [row] * config.max_num_seqs, ())
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _free_bytes_cpu() -> int:
    """Memory that is available, or what the container's limit leaves of it."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such control group, or "max": no limit
        return free
    return min(free, max(0, limit))
