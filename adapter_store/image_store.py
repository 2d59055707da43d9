"""The directory of adapter images, one content-addressed file each, shared by a control plane (writes) and data planes (read).

A file appears whole or not at all: it is written under a temporary name, synced, then renamed.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

import torch

from adapter_store.errors import AdapterCorruptError, AdapterRejectedError, ImageNotFoundError, StoreFullError, Violation
from adapter_store.geometry import BaseGeometry
from adapter_store.image import (
    LENGTH_BYTES,
    MAGIC,
    TORCH_DTYPES,
    AdapterImage,
    ImageHeader,
    file_prefix,
    tensor_bytes,
)

SUFFIX = ".image"
TEMP_SUFFIX = ".partial"
# A temporary file this old has no writer any more: images are written in seconds.
STALE_TEMP_S = 600.0
# Far above any real header (7 modules of rank 512 are 50 KB); a length beyond it is a damaged file.
MAX_HEADER_BYTES = 4 << 20
# What was read is hashed while it is still in the processor's cache: more at a time takes twice as long.
READ_CHUNK_BYTES = 256 << 10

# Gives memory for so many bytes, as [size_bytes] uint8.
Allocate = Callable[[int], torch.Tensor]


def _ordinary_memory(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8)


class ImageStore:
    """Images by digest. All methods block on file I/O and may be called from any thread and from several processes."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        """Opens (and makes) the directory and removes what a crashed writer left. max_bytes bounds all images together."""
        self._root = root
        self._max_bytes = max_bytes
        # Bytes by digest of what is being written: they count, so that two writers do not pass the bound together.
        self._under_way: dict[str, int] = {}
        self._room_lock = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        self._sweep()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(map(self._size_of, self.digests()))

    def digests(self) -> tuple[str, ...]:
        """What is in the store, sorted."""
        return tuple(sorted(path.stem for path in self._root.glob(f"*{SUFFIX}") if _is_digest(path.stem)))

    def publish(self, image: AdapterImage) -> str:
        """Writes the image and returns its digest; one that is there already is left alone.

        Raises:
            StoreFullError: it would exceed the bound, or the disk is full; nothing is left behind.
        """
        path = self._path(image.digest)
        prefix = file_prefix(image.header)
        size_bytes = len(prefix) + image.size_bytes
        with self._room_lock:
            if path.exists():
                return image.digest
            self._check_room(size_bytes)
            self._under_way[image.digest] = size_bytes
        # Many at a time: a disk takes several files in the time in which it makes sure of one.
        try:
            self._write(path, prefix, image.pages)
        except OSError as error:
            raise StoreFullError("adapter store", f"writing {path.name} failed: {error.strerror}") from error
        finally:
            with self._room_lock:
                self._under_way.pop(image.digest, None)
        return image.digest

    def read(self, digest: str, geometry: BaseGeometry, allocate: Allocate = _ordinary_memory) -> AdapterImage:
        """The image of that digest, its content verified. Its pages are read into the memory that `allocate` gives.

        Raises:
            ImageNotFoundError: it is not in the store.
            AdapterCorruptError: the file is damaged.
            AdapterRejectedError: it was packed for another base model, dtype or page size.
        """
        with self._open(digest) as file:
            header, prefix = _read_header(file)
            _check_geometry(header, geometry)
            found_bytes = os.fstat(file.fileno()).st_size - len(prefix)
            if found_bytes != header.size_bytes:
                raise AdapterCorruptError(file.name, "", f"{found_bytes} bytes of pages where {header.size_bytes} belong")
            pages = allocate(header.size_bytes).view(TORCH_DTYPES[header.dtype]).view(header.shape)
            actual = _read_pages(file, pages, prefix)
            if actual != digest:
                raise AdapterCorruptError(file.name, "", f"content has digest {actual}, not the one it is named by")
        return AdapterImage(digest, header, pages)

    def read_header(self, digest: str) -> ImageHeader:
        """The header alone, without verifying the digest.

        Raises:
            ImageNotFoundError: it is not in the store.
            AdapterCorruptError: the file is damaged.
        """
        with self._open(digest) as file:
            return _read_header(file)[0]

    def delete(self, digest: str) -> None:
        """Removes the image; one that is not there is no error. Readers that have it open read on."""
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        if not _is_digest(digest):
            raise ImageNotFoundError(digest)
        return self._root / f"{digest}{SUFFIX}"

    def _open(self, digest: str) -> BufferedReader:
        try:
            return self._path(digest).open("rb")
        except FileNotFoundError:
            raise ImageNotFoundError(digest) from None

    def _size_of(self, digest: str) -> int:
        """Bytes of a file that somebody else may delete at any moment."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def _check_room(self, new_bytes: int) -> None:
        if self._max_bytes is None:
            return
        there = sum(self._size_of(digest) for digest in self.digests() if digest not in self._under_way)
        used_bytes = there + sum(self._under_way.values())
        if used_bytes + new_bytes > self._max_bytes:
            raise StoreFullError(
                "adapter store",
                f"an image of {new_bytes} bytes does not fit beside {used_bytes} bytes; the limit is {self._max_bytes}; "
                "unregister adapters or raise the limit",
            )

    def _write(self, path: Path, prefix: bytes, pages: torch.Tensor) -> None:
        temp = self._root / f"{path.stem}.{secrets.token_hex(8)}{TEMP_SUFFIX}"
        try:
            with temp.open("xb") as file:
                file.write(prefix)
                file.write(tensor_bytes(pages))
                file.flush()
                os.fsync(file.fileno())
            temp.rename(path)
        finally:
            temp.unlink(missing_ok=True)
        _sync_directory(self._root)

    def _sweep(self) -> None:
        """Removes temporary files of writers that died; another control plane's writer may be at work on a young one."""
        for temp in self._root.glob(f"*{TEMP_SUFFIX}"):
            try:
                if time.time() - temp.stat().st_mtime > STALE_TEMP_S:
                    temp.unlink(missing_ok=True)
            except OSError:
                continue  # gone meanwhile, or this is a data plane that may only read


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def _sync_directory(directory: Path) -> None:
    """Makes a rename in it last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_header(file: BufferedReader) -> tuple[ImageHeader, bytes]:
    """The header, and all bytes of the file up to its pages."""
    start = file.read(len(MAGIC) + LENGTH_BYTES)
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if start[: len(MAGIC)] != MAGIC or len(start) != len(MAGIC) + LENGTH_BYTES or length > MAX_HEADER_BYTES:
        raise AdapterCorruptError(file.name, "", f"begins with {start.hex()}, not with an image's magic and header length")
    encoded = file.read(length)
    try:
        return ImageHeader.decode(encoded), start + encoded
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterCorruptError(file.name, "", f"header of {len(encoded)} of {length} bytes is unreadable") from error


def _read_pages(file: BufferedReader, pages: torch.Tensor, prefix: bytes) -> str:
    """Fills the pages from the file and returns the digest of everything read."""
    digest = hashlib.sha256(prefix)
    memory = tensor_bytes(pages)
    for start in range(0, len(memory), READ_CHUNK_BYTES):
        chunk = memory[start : start + READ_CHUNK_BYTES]
        num_bytes = file.readinto(chunk)
        digest.update(chunk[:num_bytes])
    return digest.hexdigest()


def _check_geometry(header: ImageHeader, geometry: BaseGeometry) -> None:
    """Refuses an image that was packed for other pages."""
    wanted = (geometry.fingerprint, geometry.dtype, geometry.num_layers, geometry.page_elems)
    found = (header.geometry_fingerprint, header.dtype, header.num_layers, header.page_elems)
    violations = [
        Violation("BASE_MISMATCH", name, f"the image was packed for {a}, this base has {b}; register the adapter again")
        for name, a, b in zip(("fingerprint", "dtype", "num_layers", "page_elems"), found, wanted, strict=True)
        if a != b
    ]
    if violations:
        raise AdapterRejectedError(violations)
