"""How many pages the pool gets: as told, or as many as the memory holds that is free once the model has run its largest step.

Knows pages by their size, and what steps need as a number of bytes that somebody measures.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from adapter_store.geometry import BaseGeometry
from adapter_store.packing import pack_rows
from dataplane.config import DataPlaneConfig

_log = logging.getLogger(__name__)

# Of the memory that is available on a machine without a GPU. Pages cost nothing there until they are first written.
CPU_MEMORY_SHARE = 0.25

# The pool's last page belongs to nobody: the padding of a step is written there.
NUM_PADDING_PAGES = 1

_CGROUP = Path("/sys/fs/cgroup")


class PoolTooSmallError(Exception):
    """The pool does not hold what it must; the message has the numbers."""


def choose_num_pages(
    config: DataPlaneConfig,
    geometry: BaseGeometry,
    max_model_len: int,
    device: torch.device,
    measure_step_bytes: Callable[[], int],
) -> int:
    """The number of pages that requests and adapters share. The pool is allocated with one more, for what padding writes.

    measure_step_bytes: what the largest step takes of the device beside weights and pool; called only if that decides.

    Raises:
        PoolTooSmallError: there is no room for a single request of any length.
    """
    if config.num_pages is not None:
        return config.num_pages
    if config.pool_bytes is not None:
        size_bytes, source = config.pool_bytes, "--pool-bytes"
    elif device.type == "cuda":
        size_bytes, source = _free_bytes_cuda(config, device, measure_step_bytes), "free GPU memory"
    else:
        size_bytes, source = int(_free_bytes_cpu() * CPU_MEMORY_SHARE), "free memory"
    num_pages = size_bytes // geometry.page_bytes - NUM_PADDING_PAGES
    if num_pages < 1:
        raise PoolTooSmallError(
            f"{source} gives the pool {max(0, size_bytes)} bytes; a page of {geometry.page_tokens} tokens takes "
            f"{geometry.page_bytes}, and at least {1 + NUM_PADDING_PAGES} are needed. Free memory, or serve a smaller model"
        )
    # More than every request at its longest, and as much again for adapters, or one of the largest for each, is of no use.
    num_kv_pages = geometry.num_kv_pages(max_model_len)
    return min(num_pages, config.max_num_seqs * (num_kv_pages + max(num_kv_pages, _largest_adapter_pages(geometry))))


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
    num_adapter_pages = _largest_adapter_pages(geometry)
    if num_adapter_pages + 1 > num_pages:
        _log.warning(
            "an adapter of rank %d (--max-lora-rank) on every module takes %d pages and its request at least one more; the pool "
            "has %d, so requests for such an adapter are refused",
            geometry.max_lora_rank,
            num_adapter_pages,
            num_pages,
        )


def _largest_adapter_pages(geometry: BaseGeometry) -> int:
    """Pages of an adapter of the largest rank on all modules."""
    return pack_rows({module.name: geometry.max_lora_rank for module in geometry.modules}, geometry).num_pages


def _free_bytes_cuda(config: DataPlaneConfig, device: torch.device, measure_step_bytes: Callable[[], int]) -> int:
    """Of the memory that is free once a step has run: kernels are loaded then, and libraries have their workspaces."""
    try:
        step_bytes = measure_step_bytes()
    except torch.OutOfMemoryError as error:
        raise PoolTooSmallError(
            f"a step of {config.token_budget} tokens (--token-budget) of {config.max_num_seqs} requests (--max-num-seqs) does "
            f"not fit beside the weights; lower one of the two, or serve a smaller model: {error}"
        ) from error
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    size_bytes = int(free - step_bytes - (1 - config.gpu_memory_utilization) * total)
    _log.info(
        "GPU memory total_mib=%d free_mib=%d steps_mib=%d pool_mib=%d",
        total >> 20,
        free >> 20,
        step_bytes >> 20,
        size_bytes >> 20,
    )
    return size_bytes


def _free_bytes_cpu() -> int:
    """Memory that is available, or what the container's limit leaves of it."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such control group, or "max": no limit
        return free
    return min(free, max(0, limit))
