"""Copies an adapter's image into pages of the pool and rewrites its row table for them.

Knows the pool tensor and the image's layout; nothing of which pages are free or who waits for the adapter.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from adapter_store.image import AdapterImage, ImageModule
from dataplane.memory.page_pool import page_runs
from kernels.lora import LoraAdapter, LoraRows


class AdapterCopy(Protocol):
    """An image on its way into pages; `adapter` may be used once it is done."""

    @property
    def adapter(self) -> LoraAdapter:
        """Where its rows lie."""
        ...

    def is_done(self) -> bool:
        """Whether the pages hold the weights."""
        ...

    def wait(self) -> None:
        """Blocks until they do: at most the milliseconds of one copy."""
        ...


class AdapterCopier(Protocol):
    """Starts copies into one pool."""

    def start(self, image: AdapterImage, pages: Sequence[int]) -> AdapterCopy:
        """Starts copying page i of the image into pages[i], in every layer."""
        ...


class TensorCopy:
    """A copy into the pool tensor. Holds the image until the device has read it."""

    def __init__(self, adapter: LoraAdapter, image: AdapterImage, done: torch.cuda.Event | None) -> None:
        self._adapter = adapter
        self._image: AdapterImage | None = image
        self._done = done

    @property
    def adapter(self) -> LoraAdapter:
        """Where its rows lie."""
        return self._adapter

    def is_done(self) -> bool:
        """Whether the pages hold the weights."""
        if self._done is not None and not self._done.query():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return False
        self._image = None
        return True

    def wait(self) -> None:
        """Blocks until the pages hold the weights."""
        if self._done is not None:
            self._done.synchronize()
        self._image = None


class TensorCopier:
    """Copies into the pool tensor [num_layers, num_pages, page_elems], one 2-D copy for each run of neighbouring pages.

    On CUDA it owns one stream, "adapter copies": the copies overlap the engine's step and are joined by an event.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]  # likewise

    def start(self, image: AdapterImage, pages: Sequence[int]) -> TensorCopy:
        """Starts copying page i of the image into pages[i], in every layer."""
        adapter = LoraAdapter({name: self._rows(module, pages) for name, module in image.header.modules.items()})
        if self._stream is None:
            self._copy_pages(image, pages)
            return TensorCopy(adapter, image, done=None)
        # The pages may have been read a moment ago, as KV or as another adapter, by work that is still queued.
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        with torch.cuda.stream(self._stream):
            self._copy_pages(image, pages)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # likewise
            done.record(self._stream)
        return TensorCopy(adapter, image, done)

    def _copy_pages(self, image: AdapterImage, pages: Sequence[int]) -> None:
        for i, length in page_runs(pages):
            first = pages[i]
            self._pool[:, first : first + length].copy_(image.pages[:, i : i + length], non_blocking=True)

    def _rows(self, module: ImageModule, pages: Sequence[int]) -> LoraRows:
        return LoraRows(
            rank=module.rank,
            scaling=module.scaling,
            a_rows=self._device_offsets(module.a_offsets, pages),
            b_rows=self._device_offsets(module.b_offsets, pages),
        )

    def _device_offsets(self, offsets: Sequence[int], pages: Sequence[int]) -> torch.Tensor:
        """Offsets in the image as offsets in one layer of the pool."""
        page_elems = self._pool.shape[2]
        moved = [pages[offset // page_elems] * page_elems + offset % page_elems for offset in offsets]
        return torch.tensor(moved, dtype=torch.int64, device=self._pool.device)
