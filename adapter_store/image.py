"""The packed image of an adapter: its weights for all layers in page shape, and the table of where each rank row lies.

Knows nothing about PEFT, files or devices; `digest` names the content, so equal bytes are one image everywhere.
"""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapter_store.geometry import LORA_MODULES, BaseGeometry
from adapter_store.packing import RowOffsets, pack_rows

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ImageModule:
    """One module of an image. Row j of A starts at a_offsets[j], row j of B transposed at b_offsets[j], in every layer.

    An offset counts elements within a layer of the image: page_in_image * page_elems + offset_in_page.
    """

    rank: int
    scaling: float
    in_features: int
    out_features: int
    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Everything about an image but its pages. `rank` is the largest among its modules, `alpha` what its author wrote."""

    geometry_fingerprint: str
    dtype: str
    num_layers: int
    num_pages: int
    page_elems: int
    modules: Mapping[str, ImageModule]
    base_model: str
    rank: int
    alpha: float
    rslora: bool

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The modules that the adapter changes, in packing order."""
        return tuple(name for name in LORA_MODULES if name in self.modules)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the pages: layers, pages per layer, elements per page."""
        return (self.num_layers, self.num_pages, self.page_elems)

    @property
    def size_bytes(self) -> int:
        """Bytes of the pages of all layers."""
        return self.num_layers * self.num_pages * self.page_elems * TORCH_DTYPES[self.dtype].itemsize

    def encode(self) -> bytes:
        """The header as canonical JSON: equal headers give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes) -> "ImageHeader":
        """The header that `encode` wrote.

        Raises:
            ValueError, TypeError, KeyError: the bytes are not such a header.
        """
        fields = json.loads(data)
        modules = {name: _decode_module(module) for name, module in fields.pop("modules").items()}
        header = cls(modules=modules, **fields)
        if header.dtype not in TORCH_DTYPES or min(header.shape) < 1:
            raise ValueError(f"pages of dtype {header.dtype} and shape {header.shape}")
        return header


def _decode_module(fields: dict[str, Any]) -> ImageModule:
    return ImageModule(**(fields | {"a_offsets": tuple(fields["a_offsets"]), "b_offsets": tuple(fields["b_offsets"])}))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class AdapterImage:
    """An adapter ready to be copied into pages.

    pages: [num_layers, num_pages, page_elems] of the pool's dtype, on the host.
    row_offsets: [rows] offsets of the header's modules, in its order, of each the rows of A and then those of B transposed. Made
        here, in the thread that reads an image, for the one that must not wait.
    """

    digest: str
    header: ImageHeader
    pages: torch.Tensor
    row_offsets: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        modules = self.header.modules.values()
        offsets = [offset for module in modules for offset in (*module.a_offsets, *module.b_offsets)]
        object.__setattr__(self, "row_offsets", np.array(offsets, dtype=np.int64))

    @property
    def size_bytes(self) -> int:
        """Bytes of the pages of all layers."""
        return self.header.size_bytes

    @property
    def num_pages(self) -> int:
        """Pages of the pool that it takes on a device."""
        return self.header.num_pages


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """Weights of one module as they go into an image, by layer. A layer that is absent, and rows below `rank`, are zero.

    lora_a: layer to [<= rank, in_features]; lora_b: layer to [out_features, <= rank], of any floating dtype.
    """

    rank: int
    scaling: float
    lora_a: Mapping[int, torch.Tensor]
    lora_b: Mapping[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AdapterOrigin:
    """What an image remembers of the adapter's own configuration."""

    base_model: str
    alpha: float
    rslora: bool


def build_image(geometry: BaseGeometry, weights: Mapping[str, ModuleWeights], origin: AdapterOrigin) -> AdapterImage:
    """Packs weights by module name into a new image."""
    header = image_header(geometry, weights, origin)
    pages = torch.zeros(header.shape, dtype=TORCH_DTYPES[geometry.dtype])
    for name, module in weights.items():
        _write_module(pages, header.modules[name], module)
    return AdapterImage(image_digest(header, pages), header, pages)


def image_header(geometry: BaseGeometry, weights: Mapping[str, ModuleWeights], origin: AdapterOrigin) -> ImageHeader:
    """The header of an image of these weights, of which only ranks and scalings matter."""
    layout = pack_rows({name: module.rank for name, module in weights.items()}, geometry)
    return ImageHeader(
        geometry_fingerprint=geometry.fingerprint,
        dtype=geometry.dtype,
        num_layers=geometry.num_layers,
        num_pages=layout.num_pages,
        page_elems=geometry.page_elems,
        modules={name: _table(weights[name], rows) for name, rows in layout.modules.items()},
        base_model=origin.base_model,
        rank=max(module.rank for module in weights.values()),
        alpha=origin.alpha,
        rslora=origin.rslora,
    )


def _table(weights: ModuleWeights, rows: RowOffsets) -> ImageModule:
    return ImageModule(
        weights.rank, weights.scaling, rows.in_features, rows.out_features, a_offsets=rows.a_offsets, b_offsets=rows.b_offsets
    )


def _write_module(pages: torch.Tensor, table: ImageModule, weights: ModuleWeights) -> None:
    """Copies one module's rows to where the table says."""
    for layer, lora_a in weights.lora_a.items():
        _write_rows(pages[layer], table.a_offsets, lora_a)
    for layer, lora_b in weights.lora_b.items():
        _write_rows(pages[layer], table.b_offsets, lora_b.t())


def _write_rows(layer_pages: torch.Tensor, offsets: tuple[int, ...], rows: torch.Tensor) -> None:
    """rows: [<= rank, num_elems]."""
    flat = layer_pages.view(-1)
    for offset, row in zip(offsets, rows, strict=False):
        flat[offset : offset + row.numel()] = row


def unpack_module(image: AdapterImage, layer: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A as [rank, in_features] and B transposed as [rank, out_features] of one module of one layer, without the scaling."""
    table = image.header.modules[name]
    flat = image.pages[layer].view(-1)
    lora_a = torch.stack([flat[offset : offset + table.in_features] for offset in table.a_offsets])
    lora_b_t = torch.stack([flat[offset : offset + table.out_features] for offset in table.b_offsets])
    return lora_a, lora_b_t


def image_digest(header: ImageHeader, pages: torch.Tensor) -> str:
    """SHA-256, in hex, over what a file of this image holds."""
    digest = hashlib.sha256(file_prefix(header))
    digest.update(tensor_bytes(pages))
    return digest.hexdigest()


# First bytes of an image's file; the digit is the version of the format.
MAGIC = b"LPIMAGE1"
LENGTH_BYTES = 8


def file_prefix(header: ImageHeader) -> bytes:
    """What stands before the pages in a file: magic, length of the header (little-endian), header."""
    encoded = header.encode()
    return MAGIC + len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor, without a copy; the caller keeps the tensor alive."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu", f"{tensor.device} tensor, strides {tensor.stride()}"
    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
