"""Adapters with random weights, made in page shape at the speed of copying memory: thousands of them for a benchmark.

Knows the base's geometry and the layout of an image; nothing of names, files or devices.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from adapter_store.errors import shorten
from adapter_store.geometry import BaseGeometry
from adapter_store.image import TORCH_DTYPES, AdapterImage, AdapterOrigin, ImageHeader, ModuleWeights, file_prefix, image_header
from adapter_store.violations import ViolationList

# What the version of a dummy adapter says that it was trained for.
BASE_MODEL = "dummy"
# Pieces cut from it at random seldom overlap.
NOISE_ELEMS = 8 << 20
# Pieces of the noise that make up an image: hashed while they are still in the processor's cache, which halves the time.
PIECE_ELEMS = 64 << 10
# Pieces begin on a cache line, whatever the dtype.
PIECE_ALIGN_ELEMS = 32


@dataclass(frozen=True, slots=True)
class DummyAdapter:
    """What makes up a dummy: equal fields give equal weights."""

    rank: int
    target_modules: tuple[str, ...]
    seed: int


def build_dummy(dummy: DummyAdapter, geometry: BaseGeometry) -> AdapterImage:
    """The image of a dummy, within the limits of any other adapter. rank: at least 1.

    Raises:
        AdapterRejectedError: the base cannot take it; has every violation.
    """
    _check(dummy, geometry)
    weights = {name: ModuleWeights(dummy.rank, scaling=1.0, lora_a={}, lora_b={}) for name in dummy.target_modules}
    header = image_header(geometry, weights, AdapterOrigin(BASE_MODEL, alpha=dummy.rank, rslora=False))
    digest, pages = _random_pages(header, dummy.seed)
    return AdapterImage(digest, header, pages)


def _check(dummy: DummyAdapter, geometry: BaseGeometry) -> None:
    violations = ViolationList()
    have = ", ".join(shape.name for shape in geometry.modules)
    if not dummy.target_modules:
        violations.add("NO_TARGETS", "target_modules", f"is empty; it must name modules of this base's layers ({have})")
    for name in dummy.target_modules:
        if geometry.module(name) is None:
            violations.add("UNSUPPORTED_MODULE", shorten(name), f"is no linear module of this base's layers ({have})")
    if dummy.rank > geometry.max_lora_rank:
        limit = geometry.max_lora_rank
        violations.add("RANK_LIMIT", "rank", f"rank {dummy.rank} exceeds this service's max_lora_rank of {limit}")
    violations.raise_if_any()


def _random_pages(header: ImageHeader, seed: int) -> tuple[str, torch.Tensor]:
    """The image's digest, and pages put together from pieces of the noise. What lies between rows is filled too, for nobody."""
    pages = torch.empty(header.shape, dtype=TORCH_DTYPES[header.dtype])
    memory, noise = _bytes(pages), _bytes(_noise(pages.dtype))
    digest = hashlib.sha256(file_prefix(header))
    piece_bytes = PIECE_ELEMS * pages.element_size()
    places = range(0, len(memory), piece_bytes)
    for place, start in zip(places, _starts(seed, len(places)), strict=True):
        piece = memory[place : place + piece_bytes]
        start_bytes = start * pages.element_size()
        # By numpy, which stays in this thread and lets the others run; torch would spread so little over all cores.
        piece[:] = noise[start_bytes : start_bytes + len(piece)]
        digest.update(piece.data)
    return digest.hexdigest(), pages


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a tensor, which the array keeps alive."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _starts(seed: int, count: int) -> Iterator[int]:
    """Where pieces are cut from the noise."""
    num_places = (NOISE_ELEMS - PIECE_ELEMS) // PIECE_ALIGN_ELEMS
    drawn = hashlib.shake_256(seed.to_bytes(8, "little")).digest(4 * count)
    return (PIECE_ALIGN_ELEMS * (number % num_places) for (number,) in struct.iter_unpack("<I", drawn))


@cache
def _noise(dtype: torch.dtype) -> torch.Tensor:
    """Numbers spread evenly between -1/64 and 1/64, which every dtype holds exactly."""
    drawn = bytearray(hashlib.shake_256(b"loraplane dummy adapters").digest(NOISE_ELEMS))
    return torch.frombuffer(drawn, dtype=torch.int8).to(dtype) / 8192
