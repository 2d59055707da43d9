"""An image is in the store whole and true, or not at all."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_store.errors import AdapterCorruptError, AdapterRejectedError, ImageNotFoundError, StoreFullError
from adapter_store.geometry import BaseGeometry
from adapter_store.image import AdapterImage
from adapter_store.image_store import STALE_TEMP_S, ImageStore

MakeImage = Callable[[int], AdapterImage]


def files(root: Path) -> list[str]:
    """What lies in the directory."""
    return sorted(path.name for path in root.iterdir())


def test_what_is_read_is_what_was_published(make_image: MakeImage, geometry: BaseGeometry, tmp_path: Path) -> None:
    image = make_image(1)
    assert ImageStore(tmp_path).publish(image) == image.digest
    other = ImageStore(tmp_path)
    read = other.read(image.digest, geometry)
    assert (read.digest, read.header) == (image.digest, image.header)
    assert torch.equal(read.pages, image.pages)
    assert other.read_header(image.digest) == image.header
    assert other.digests() == (image.digest,)
    assert other.size_bytes == (tmp_path / f"{image.digest}.image").stat().st_size


def test_the_digest_is_the_sha256_of_the_file(make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image(1)
    ImageStore(tmp_path).publish(image)
    assert hashlib.sha256((tmp_path / f"{image.digest}.image").read_bytes()).hexdigest() == image.digest


def test_publishing_again_changes_nothing(make_image: MakeImage, tmp_path: Path) -> None:
    store, image = ImageStore(tmp_path), make_image(1)
    store.publish(image)
    before = (tmp_path / f"{image.digest}.image").stat().st_mtime_ns
    store.publish(image)
    assert (tmp_path / f"{image.digest}.image").stat().st_mtime_ns == before
    assert files(tmp_path) == [f"{image.digest}.image"]


def test_a_deleted_image_is_gone_and_deleting_again_is_no_error(
    make_image: MakeImage, geometry: BaseGeometry, tmp_path: Path
) -> None:
    store, image = ImageStore(tmp_path), make_image(1)
    store.publish(image)
    store.delete(image.digest)
    store.delete(image.digest)
    assert files(tmp_path) == []
    with pytest.raises(ImageNotFoundError, match=image.digest):
        store.read(image.digest, geometry)


@pytest.mark.parametrize("digest", ["0" * 64, "", "../secret", "A" * 64, "0" * 63])
def test_an_unknown_or_malformed_digest_is_not_found(digest: str, geometry: BaseGeometry, tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    with pytest.raises(ImageNotFoundError):
        store.read(digest, geometry)
    with pytest.raises(ImageNotFoundError):
        store.read_header(digest)


def test_a_file_cut_anywhere_is_corrupt(make_image: MakeImage, geometry: BaseGeometry, tmp_path: Path) -> None:
    store, image = ImageStore(tmp_path), make_image(1)
    store.publish(image)
    path = tmp_path / f"{image.digest}.image"
    content = path.read_bytes()
    for length in [*range(0, 40), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(AdapterCorruptError, match=image.digest):
            store.read(image.digest, geometry)
    path.write_bytes(content + b"x")
    with pytest.raises(AdapterCorruptError, match="bytes of pages where"):
        store.read(image.digest, geometry)


def test_a_changed_byte_is_corrupt_wherever_it_is(make_image: MakeImage, geometry: BaseGeometry, tmp_path: Path) -> None:
    store, image = ImageStore(tmp_path), make_image(1)
    store.publish(image)
    path = tmp_path / f"{image.digest}.image"
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 97):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        # A changed header may as well name another base.
        with pytest.raises((AdapterCorruptError, AdapterRejectedError)):
            store.read(image.digest, geometry)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"num_layers": 4}, "num_layers"),
        ({"num_kv_heads": 8}, "page_elems"),
    ],
)
def test_an_image_for_another_base_is_refused(
    change: dict[str, object], named: str, make_image: MakeImage, geometry: BaseGeometry, tmp_path: Path
) -> None:
    store, image = ImageStore(tmp_path), make_image(1)
    store.publish(image)
    with pytest.raises(AdapterRejectedError) as caught:
        store.read(image.digest, replace(geometry, **change))  # type: ignore[arg-type]  # one field each
    assert [v.subject for v in caught.value.violations] == [named]


def test_the_byte_bound_holds_and_a_refused_image_leaves_nothing(make_image: MakeImage, tmp_path: Path) -> None:
    first, second = make_image(1), make_image(2)
    one = ImageStore(tmp_path / "measure")
    one.publish(first)
    store = ImageStore(tmp_path / "store", max_bytes=one.size_bytes + 100)
    store.publish(first)
    with pytest.raises(StoreFullError, match=f"the limit is {one.size_bytes + 100}"):
        store.publish(second)
    store.publish(first)
    assert files(tmp_path / "store") == [f"{first.digest}.image"]
    store.delete(first.digest)
    store.publish(second)


def test_a_disk_that_fails_leaves_nothing(make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreFullError, match="No space left on device"):
        store.publish(make_image(1))
    assert files(tmp_path) == []


def test_opening_sweeps_what_a_crashed_writer_left_and_nothing_else(make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image(1)
    ImageStore(tmp_path).publish(image)
    old, young = tmp_path / "old.partial", tmp_path / "young.partial"
    old.touch()
    young.touch()
    age = old.stat().st_mtime - STALE_TEMP_S - 1
    os.utime(old, (age, age))
    ImageStore(tmp_path)
    assert files(tmp_path) == sorted([f"{image.digest}.image", "young.partial"])


def test_a_store_that_may_only_be_read_opens_beside_what_it_cannot_sweep(
    make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(1)
    ImageStore(tmp_path).publish(image)
    stale = tmp_path / "left.partial"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert ImageStore(tmp_path).digests() == (image.digest,)


def test_images_are_written_beside_each_other_and_keep_the_bound_together(
    make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [make_image(seed) for seed in range(3)]
    measure = ImageStore(tmp_path / "measure")
    measure.publish(images[0])
    size_bytes = measure.size_bytes
    store = ImageStore(tmp_path / "store", max_bytes=2 * size_bytes)
    all_here, is_refused, fsync = threading.Barrier(3), threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        if not is_refused.is_set():
            all_here.wait(10)
            is_refused.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with ThreadPoolExecutor(2) as threads:
        writing = [threads.submit(store.publish, image) for image in images[:2]]
        all_here.wait(10)
        with pytest.raises(StoreFullError, match=f"beside {2 * size_bytes} bytes"):
            store.publish(images[2])
        is_refused.set()
    assert {each.result() for each in writing} == set(store.digests())
    assert store.size_bytes == 2 * size_bytes
    store.delete(images[0].digest)
    store.publish(images[2])


def test_writers_of_the_same_image_do_not_disturb_each_other(
    make_image: MakeImage, geometry: BaseGeometry, tmp_path: Path
) -> None:
    image = make_image(3)
    # A store each, as in two processes: they share no lock.
    stores = [ImageStore(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(len(stores)) as threads:
        assert set(threads.map(lambda store: store.publish(image), stores)) == {image.digest}
    assert files(tmp_path) == [f"{image.digest}.image"]
    assert torch.equal(stores[0].read(image.digest, geometry).pages, image.pages)
