"""Copies an adapter's image into pages of the pool and rewrites its row table for them.

Knows the pool tensor and the image's layout; nothing of which pages are free or who waits for the adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from adapter_store.image import AdapterImage
from dataplane.memory.page_pool import page_runs
from kernels.lora import LoraAdapter, LoraRows
from kernels.page_copy import PageCopier
from kernels.uploads import upload


class AdapterCopy(Protocol):
    """An image on its way into pages; `adapter` may be used once it is done."""

    @property
    def adapter(self) -> LoraAdapter:
        """Where its rows lie."""
        ...

    def is_done(self) -> bool:
        """Whether what is launched from now on finds the weights in the pages."""
        ...

    def wait(self) -> None:
        """Blocks until it does: at most the milliseconds of one copy."""
        ...

    def join(self) -> None:
        """Makes it done, for the device waits for it: what is launched from now on, be it to read the pages or to write something
        else there, comes after it."""
        ...


class AdapterCopier(Protocol):
    """Starts copies into one pool."""

    def start(self, image: AdapterImage, pages: Sequence[int]) -> AdapterCopy:
        """Starts copying page i of the image into pages[i], in every layer."""
        ...


@dataclass(frozen=True, slots=True)
class CopyOnItsWay:
    """done: recorded behind it. source: what the device reads until then."""

    done: torch.cuda.Event
    source: AdapterImage

    def is_done(self) -> bool:
        """Whether the device has read the source and the pages hold it."""
        is_done: bool = self.done.query()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return is_done


class TensorCopy:
    """A copy into the pool tensor. Holds what the device reads until it has read it."""

    def __init__(self, adapter: LoraAdapter, on_its_way: CopyOnItsWay | None, joined: list[CopyOnItsWay]) -> None:
        """on_its_way: None if it is done already. joined: where it is held when it is nobody's but the device's."""
        self.adapter = adapter
        self._on_its_way = on_its_way
        self._joined = joined

    def is_done(self) -> bool:
        """Whether the pages hold the weights, or it was joined."""
        if self._on_its_way is not None and self._on_its_way.is_done():
            self._on_its_way = None
        return self._on_its_way is None

    def wait(self) -> None:
        """Blocks until the pages hold the weights, unless it was joined."""
        if self._on_its_way is not None:
            self._on_its_way.done.synchronize()
            self._on_its_way = None

    def join(self) -> None:
        """Lets the compute stream wait for it."""
        if self._on_its_way is not None:
            self._on_its_way.done.wait()
            # The device may be far from done, and whoever has this may drop it at once.
            self._joined.append(self._on_its_way)
            self._on_its_way = None


class TensorCopier:
    """Copies into the pool tensor [num_layers, num_pages, page_elems], one call for each run of neighbouring pages.

    On CUDA it owns one stream, "adapter copies": the copies overlap the engine's steps and are joined by an event. Nothing here
    waits for the device.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._pages = PageCopier(pool) if pool.is_cuda else None
        self._joined: list[CopyOnItsWay] = []

    def start(self, image: AdapterImage, pages: Sequence[int]) -> TensorCopy:
        """Starts copying page i of the image into pages[i], in every layer, for when the steps launched by now are done."""
        if self._stream is None or self._pages is None:
            for i, length in page_runs(pages):
                self._pool[:, pages[i] : pages[i] + length].copy_(image.pages[:, i : i + length])
            return TensorCopy(_adapter(image, torch.from_numpy(row_table(image, pages))), None, self._joined)
        self._joined[:] = [copy for copy in self._joined if not copy.is_done()]
        # A step on its way may still read the pages, as KV or as another adapter, and the memory that the table gets: torch gives
        # it out again on this stream as soon as the adapter that had it is dropped, and every write here comes after this.
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        with torch.cuda.stream(self._stream):
            self._pages.start(image.pages, ((i, pages[i], length) for i, length in page_runs(pages)), self._stream)
            rows = torch.from_numpy(row_table(image, pages))
            table = torch.empty_like(rows, device=self._pool.device)
            upload(table, rows)
            done = self._stream.record_event()
        return TensorCopy(_adapter(image, table), CopyOnItsWay(done, image), self._joined)


def row_table(image: AdapterImage, pages: Sequence[int]) -> NDArray[np.int64]:
    """Where each row of the image lies in one layer of the pool, once page i of the image is pages[i]; in the image's order."""
    page_elems = image.header.page_elems
    page_in_image, offset = np.divmod(image.row_offsets, page_elems)
    return np.asarray(pages, dtype=np.int64)[page_in_image] * page_elems + offset


def _adapter(image: AdapterImage, table: torch.Tensor) -> LoraAdapter:
    """table: [rows] int64, the row table where the kernels read it; of each module first the rows of A, then those of B."""
    modules = image.header.modules
    parts = iter(torch.split_with_sizes(table, [module.rank for module in modules.values() for _ in range(2)]))
    return LoraAdapter(
        {name: LoraRows(module.rank, module.scaling, next(parts), next(parts)) for name, module in modules.items()}
    )
