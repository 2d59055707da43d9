"""Where each rank row of an adapter lies in its image: a pure function of the ranks and the base's geometry.

Knows nothing about weights, files or devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from adapter_store.geometry import LORA_MODULES, ROW_ALIGN_BYTES, BaseGeometry


@dataclass(frozen=True, slots=True)
class RowOffsets:
    """Element offsets, within one layer of the image, of the rank rows of one module, and the rows' lengths."""

    in_features: int
    out_features: int
    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Pages that an image takes, and where its rows lie in them; the same in every layer."""

    num_pages: int
    modules: Mapping[str, RowOffsets]


def pack_rows(ranks: Mapping[str, int], geometry: BaseGeometry) -> ImageLayout:
    """Places rows first-fit: modules in LORA_MODULES order, of each first its rows of A, then its rows of B transposed.

    ranks: rank (at least 1) by the name of a module that the base has.
    """
    packer = _FirstFit(geometry.page_elems, ROW_ALIGN_BYTES // geometry.dtype_bytes)
    modules: dict[str, RowOffsets] = {}
    for name in LORA_MODULES:
        if name not in ranks:
            continue
        shape = geometry.module(name)
        assert shape is not None, f"the base has no module {name}"
        modules[name] = RowOffsets(
            in_features=shape.in_features,
            out_features=shape.out_features,
            a_offsets=tuple(packer.place(shape.in_features) for _ in range(ranks[name])),
            b_offsets=tuple(packer.place(shape.out_features) for _ in range(ranks[name])),
        )
    return ImageLayout(packer.num_pages, modules)


class _FirstFit:
    """Fills pages row by row; a row starts aligned and never crosses a page."""

    def __init__(self, page_elems: int, align_elems: int) -> None:
        self._page_elems = page_elems
        self._align_elems = align_elems
        self._used: list[int] = []
        # Pages only fill up, so a row of the same length never fits before the page where the last one went.
        self._first_page: dict[int, int] = {}

    @property
    def num_pages(self) -> int:
        return len(self._used)

    def place(self, num_elems: int) -> int:
        """Offset of a new row of that many elements."""
        assert 0 < num_elems <= self._page_elems, f"a row of {num_elems} elements in pages of {self._page_elems}"
        page = self._first_page.get(num_elems, 0)
        while page < len(self._used) and self._used[page] + num_elems > self._page_elems:
            page += 1
        if page == len(self._used):
            self._used.append(0)
        self._first_page[num_elems] = page
        start = self._used[page]
        end = start + num_elems
        self._used[page] = -(-end // self._align_elems) * self._align_elems
        return page * self._page_elems + start
