"""A pool without unified memory: some pages hold KV and nothing else, the others are slots of equal size, one for each adapter.

What vLLM and SGLang do. A slot holds the largest adapter that is served, so a small one wastes the rest of it; KV never gets a
slot that is empty, nor adapters a page that KV does not need. Knows nothing of requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapter_store.geometry import BaseGeometry
from adapter_store.image import AdapterImage
from adapter_store.packing import pack_rows
from dataplane.memory.adapter_copy import AdapterCopier, AdapterCopy
from dataplane.memory.adapter_states import AdapterEntry
from dataplane.memory.host_images import FetchResult, HostImages
from dataplane.memory.page_pool import PageOwner, PagePool
from dataplane.memory.pool_sizing import PoolTooSmallError
from dataplane.memory.residency import Residency


class AdapterSlots(PagePool):
    """The pages past those of KV, handed out a slot at a time."""

    def __init__(self, first_page: int, num_slots: int, slot_pages: int) -> None:
        super().__init__(num_slots * slot_pages)
        self._first_page = first_page
        self.slot_pages = slot_pages

    def allocate(self, num_pages: int, owner: PageOwner) -> tuple[int, ...] | None:
        """A whole slot, whatever is asked for; None if there is no free one."""
        assert num_pages <= self.slot_pages, f"{num_pages} pages asked for in a slot of {self.slot_pages}"
        pages = super().allocate(self.slot_pages, owner)
        return None if pages is None else tuple(self._first_page + page for page in pages)

    def free(self, pages: Sequence[int], owner: PageOwner) -> None:
        """Takes a slot back."""
        super().free([page - self._first_page for page in pages], owner)


class SlotResidency(Residency):
    """Adapters in slots: what they do not use is nobody's, so nothing can be reclaimed from them. Pins are not heeded."""

    def __init__(
        self, slots: AdapterSlots, host: HostImages, copier: AdapterCopier, on_fetched: Callable[[str, FetchResult], None]
    ) -> None:
        super().__init__(slots, host, _SlotCopier(copier), on_fetched)
        self._slots = slots

    @property
    def num_idle_pages(self) -> int:
        """Pages that KV can get from adapters."""
        return 0

    def reclaim(self, num_pages: int) -> bool:
        """Evicts nothing: with num_idle_pages 0, nobody asks for more pages of KV than are free."""
        return True

    def set_pinned(self, digests: Sequence[str]) -> None:
        """Heeds none: with all slots pinned the rest would never run, and admission counts slots, not pins."""

    def advance_prefetch(self, num_reserved_pages: int) -> None:
        """Brings what will be needed soon into slots that nobody uses; KV needs none of them."""
        super().advance_prefetch(0)

    def _activate(self, entry: AdapterEntry, image: AdapterImage) -> bool:
        """Gives the adapter a slot, an idle one's if none is free."""
        return super().reclaim(image.num_pages) and super()._activate(entry, image)

    def _misfit(self, image: AdapterImage) -> str | None:
        size = self._slots.slot_pages
        if image.num_pages <= size:
            return None
        return f"adapter {image.digest} takes {image.num_pages} pages, a slot has {size}; see --max-lora-rank and --slot-modules"


class _SlotCopier:
    """Copies an image to the start of its slot."""

    def __init__(self, copier: AdapterCopier) -> None:
        self._copier = copier

    def start(self, image: AdapterImage, pages: Sequence[int]) -> AdapterCopy:
        """Starts copying page i of the image into pages[i]; the slot may have more of them."""
        return self._copier.start(image, pages[: image.num_pages])


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Makes the books of such a pool. modules: those that a slot has room for, at the largest rank that is served."""

    num_slots: int
    modules: tuple[str, ...]

    def __call__(
        self,
        geometry: BaseGeometry,
        num_pages: int,
        host: HostImages,
        copier: AdapterCopier,
        on_fetched: Callable[[str, FetchResult], None],
    ) -> tuple[PagePool, Residency]:
        """The pages of KV, and the adapters. num_pages: of the whole pool; what the slots leave is for KV.

        Raises:
            PoolTooSmallError: nothing is left.
        """
        num_slots, size = self.num_slots, slot_pages(geometry, self.modules)
        num_kv_pages = num_pages - num_slots * size
        if num_kv_pages < 1:
            raise PoolTooSmallError(
                f"{num_slots} slots of {size} pages leave nothing for KV in a pool of {num_pages}; lower --slots or "
                "--max-lora-rank, name fewer --slot-modules, or give the pool more"
            )
        kv_pages = PagePool(num_kv_pages)
        return kv_pages, SlotResidency(AdapterSlots(num_kv_pages, num_slots, size), host, copier, on_fetched)


def slot_pages(geometry: BaseGeometry, modules: Sequence[str]) -> int:
    """Pages that the largest adapter takes: of the largest rank on these modules, or on all of the base if none is named."""
    shapes = [shape.name for shape in geometry.modules if not modules or shape.name in modules]
    return pack_rows(dict.fromkeys(shapes, geometry.max_lora_rank), geometry).num_pages
