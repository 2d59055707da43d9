"""Adapters that clients send: files received into a private directory, each used once or dropped after a while.

Knows nothing about gRPC or PEFT. File I/O blocks; an upload is written by one thread at a time, the area is thread-safe.
"""

import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapter_store.errors import SourceNotFoundError, StoreFullError, UploadError, shorten

UPLOAD_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(slots=True)
class _OpenFile:
    """The file that an upload is receiving."""

    name: str
    size_bytes: int
    sha256: str
    file: BinaryIO
    digest: "hashlib._Hash"
    received_bytes: int = 0


class Upload:
    """One upload while it arrives. It ends with `finish` or `discard`; discarding twice, or after `finish`, does nothing.

    As a context manager it discards itself at the end of the context, unless it was finished.
    """

    def __init__(self, upload_id: str, directory: Path, max_bytes: int, area: "UploadArea") -> None:
        self._id = upload_id
        self._directory = directory
        self._max_bytes = max_bytes
        self._area = area
        self._open: _OpenFile | None = None
        self._names: list[str] = []
        self._size_bytes = 0

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    @property
    def size_bytes(self) -> int:
        """Bytes received, all files."""
        return self._size_bytes

    def open_file(self, name: str, size_bytes: int, sha256: str) -> None:
        """Ends the open file and begins the next.

        Raises:
            UploadError: the header is wrong, or the file before it is not complete.
            StoreFullError: the upload would exceed its size limit, or the disk is full.
        """
        self._close_file()
        if name not in UPLOAD_FILES:
            raise UploadError("file.name", f"{shorten(name)!r} is not one of {', '.join(UPLOAD_FILES)}")
        if name in self._names:
            raise UploadError("file.name", f"{name} was sent already")
        if len(sha256) != 64 or not all(c in "0123456789abcdef" for c in sha256.lower()):
            raise UploadError("file.sha256", f"{shorten(sha256)!r} is not a SHA-256 in hex (64 digits)")
        if size_bytes <= 0:
            raise UploadError("file.size_bytes", f"{size_bytes} for {name}; a file has at least 1 byte")
        if self._size_bytes + size_bytes > self._max_bytes:
            total = self._size_bytes + size_bytes
            raise StoreFullError("upload", f"{name} would make it {total} bytes; the limit is {self._max_bytes}")
        try:
            file = (self._directory / name).open("xb")
        except OSError as error:
            raise StoreFullError("upload", f"opening {name} failed: {error.strerror}") from error
        self._open = _OpenFile(name, size_bytes, sha256.lower(), file, hashlib.sha256())
        self._names.append(name)

    def write(self, chunk: bytes) -> None:
        """Appends to the open file.

        Raises:
            UploadError: no file is open, or it gets longer than its header said.
            StoreFullError: the disk is full.
        """
        current = self._open
        if current is None:
            raise UploadError("chunk", "came before the header of a file")
        current.received_bytes += len(chunk)
        if current.received_bytes > current.size_bytes:
            raise UploadError("chunk", f"{current.name} is longer than the {current.size_bytes} bytes of its header")
        current.digest.update(chunk)
        try:
            current.file.write(chunk)
        except OSError as error:
            raise StoreFullError("upload", f"writing {current.name} failed: {error.strerror}") from error
        self._size_bytes += len(chunk)

    def finish(self) -> str:
        """Ends the upload and returns its id, for one `UploadArea.take`.

        Raises:
            UploadError: the last file is not complete, or a file is missing.
        """
        self._close_file()
        missing = [name for name in UPLOAD_FILES if name not in self._names]
        if missing:
            raise UploadError("file", f"{' and '.join(missing)} was not sent")
        self._area._complete(self._id)
        return self._id

    def discard(self) -> None:
        """Drops an upload that is not finished, and all that it wrote."""
        if self._open is not None:
            self._open.file.close()
            self._open = None
        self._area._abandon(self._id)

    def _close_file(self) -> None:
        """Checks and closes the open file."""
        current, self._open = self._open, None
        if current is None:
            return
        try:
            current.file.close()
        except OSError as error:
            raise StoreFullError("upload", f"writing {current.name} failed: {error.strerror}") from error
        if current.received_bytes != current.size_bytes:
            got, wanted = current.received_bytes, current.size_bytes
            raise UploadError("chunk", f"{current.name} ended after {got} of the {wanted} bytes of its header")
        if current.digest.hexdigest() != current.sha256:
            found = current.digest.hexdigest()
            raise UploadError("file.sha256", f"{current.name} has SHA-256 {found}, its header said {current.sha256}")


class UploadArea:
    """All uploads of one control plane, bounded in number; what is not taken within `ttl_s` of its finish is dropped."""

    def __init__(
        self, root: Path, max_bytes: int, max_uploads: int, ttl_s: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Makes the directory and removes what an earlier process left: ids do not outlive their process.

        max_bytes bounds one upload, max_uploads those that arrive or wait.
        """
        self._root = root
        self._max_bytes = max_bytes
        self._max_uploads = max_uploads
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        # When each upload expires; None while it arrives, which its rpc's deadline bounds.
        self._expiry: dict[str, float | None] = {}
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.iterdir():
            _remove(leftover)

    @property
    def ttl_s(self) -> float:
        """How long a finished upload waits to be taken."""
        return self._ttl_s

    def begin(self) -> Upload:
        """A new upload.

        Raises:
            StoreFullError: too many arrive or wait, or the disk is full.
        """
        self.expire()
        upload_id = secrets.token_hex(16)
        with self._lock:
            if len(self._expiry) >= self._max_uploads:
                raise StoreFullError(
                    "uploads", f"{len(self._expiry)} arrive or wait to be used; the limit is {self._max_uploads}"
                )
            directory = self._root / upload_id
            try:
                directory.mkdir()
            except OSError as error:
                raise StoreFullError("uploads", f"making a directory failed: {error.strerror}") from error
            self._expiry[upload_id] = None
        return Upload(upload_id, directory, self._max_bytes, self)

    @contextmanager
    def take(self, upload_id: str) -> Iterator[Path]:
        """The directory of a finished upload, for as long as the context lasts; afterwards it is gone.

        Raises:
            SourceNotFoundError: no such upload; it was used, has expired, or is not finished.
        """
        self.expire()
        with self._lock:
            if self._expiry.get(upload_id) is None:
                raise SourceNotFoundError(f"upload {upload_id}", "does not exist; it was used already or has expired")
            del self._expiry[upload_id]
        try:
            yield self._root / upload_id
        finally:
            _remove(self._root / upload_id)

    def expire(self) -> None:
        """Drops the finished uploads whose time is over."""
        now = self._clock()
        with self._lock:
            over = [upload_id for upload_id, expiry in self._expiry.items() if expiry is not None and expiry <= now]
            for upload_id in over:
                del self._expiry[upload_id]
        for upload_id in over:
            _remove(self._root / upload_id)

    def _complete(self, upload_id: str) -> None:
        with self._lock:
            self._expiry[upload_id] = self._clock() + self._ttl_s

    def _abandon(self, upload_id: str) -> None:
        """Forgets an upload that still arrives; one that is finished (or gone) is left alone."""
        with self._lock:
            if upload_id not in self._expiry or self._expiry[upload_id] is not None:
                return
            del self._expiry[upload_id]
        _remove(self._root / upload_id)


def _remove(path: Path) -> None:
    """Removes a directory with all in it, or a stray file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
