"""The parts of a data plane that a comparison may replace. The data plane itself never does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapter_store.geometry import BaseGeometry
from dataplane.memory.adapter_copy import AdapterCopier
from dataplane.memory.host_images import FetchResult, HostImages
from dataplane.memory.page_pool import PagePool
from dataplane.memory.residency import Residency
from kernels.backend import lora_ops
from kernels.lora import LoraOps, LoraTarget
from kernels.plan_layout import LoraLimits

OnFetched = Callable[[str, FetchResult], None]


def unified_memory(
    geometry: BaseGeometry, num_pages: int, host: HostImages, copier: AdapterCopier, on_fetched: OnFetched
) -> tuple[PagePool, Residency]:
    """Requests and adapters take their pages from one pool."""
    pages = PagePool(num_pages)
    return pages, Residency(pages, host, copier, on_fetched)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a data plane is made with.

    lora_ops: makes the LoRA operation from the targets of each input, the pool's dtype, its device and the largest step.
    memory: makes the books of the pool from the base's geometry and the number of pages: the pages that requests get theirs
        from, and are admitted against, and the adapters, with what Residency is given for them.
    """

    lora_ops: Callable[[Sequence[tuple[LoraTarget, ...]], torch.dtype, torch.device, LoraLimits], LoraOps] = lora_ops
    memory: Callable[[BaseGeometry, int, HostImages, AdapterCopier, OnFetched], tuple[PagePool, Residency]] = unified_memory
