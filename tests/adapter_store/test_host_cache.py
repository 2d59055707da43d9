"""The host cache never exceeds its bound, reads an image once for all who ask, and answers each of them."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.errors import AdapterCorruptError, ImageNotFoundError, StoreFullError
from adapter_store.geometry import BaseGeometry
from adapter_store.host_cache import HostCache
from adapter_store.image import AdapterImage
from adapter_store.image_store import Allocate, ImageStore

NUM_IMAGES = 6


class SlowStore(ImageStore):
    """A real store whose reads wait until they are let go, and are counted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[str] = []

    def read(self, digest: str, geometry: BaseGeometry, *memory: Allocate) -> AdapterImage:
        self.reads.append(digest)
        assert self.gate.wait(30)
        return super().read(digest, geometry, *memory)


@pytest.fixture(scope="module")
def digests(make_image: Callable[[int], AdapterImage], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A store's directory, and the digests in it; all images have the same size."""
    root = tmp_path_factory.mktemp("store")
    store = ImageStore(root)
    return root, [store.publish(make_image(seed)) for seed in range(NUM_IMAGES)]


@pytest.fixture
def store(digests: tuple[Path, list[str]]) -> SlowStore:
    return SlowStore(digests[0])


@pytest.fixture
def open_cache(store: SlowStore, geometry: BaseGeometry) -> Iterator[Callable[..., HostCache]]:
    """Makes caches; at the end their books must be right."""
    caches: list[HostCache] = []

    def make(capacity_images: float, **options: Any) -> HostCache:
        size = store.read_header(store.digests()[0]).size_bytes
        caches.append(HostCache(store, geometry, int(size * capacity_images), **options))
        return caches[-1]

    yield make
    store.gate.set()
    for cache in caches:
        cache.close()
        cache.check_integrity()


def fetch(cache: HostCache, digest: str) -> AdapterImage | Exception:
    """One fetch, waited for."""
    done: Queue[tuple[str, AdapterImage | Exception]] = Queue()
    cache.fetch(digest, lambda name, result: done.put((name, result)))
    name, result = done.get(timeout=30)
    assert name == digest
    return result


def test_a_fetched_image_is_cached_and_read_once(
    open_cache: Callable[..., HostCache], store: SlowStore, digests: tuple[Path, list[str]]
) -> None:
    cache, digest = open_cache(2), digests[1][0]
    assert cache.get(digest) is None
    image = fetch(cache, digest)
    assert isinstance(image, AdapterImage)
    assert cache.get(digest) is image
    assert fetch(cache, digest) is image
    assert cache.size_bytes == image.size_bytes
    assert store.reads == [digest]


def test_fetches_of_one_digest_share_a_read_and_all_are_answered(
    open_cache: Callable[..., HostCache], store: SlowStore, digests: tuple[Path, list[str]]
) -> None:
    cache, digest = open_cache(2), digests[1][0]
    done: Queue[AdapterImage | Exception] = Queue()
    store.gate.clear()
    for _ in range(5):
        cache.fetch(digest, lambda _, result: done.put(result))
    store.gate.set()
    assert len({id(done.get(timeout=30)) for _ in range(5)}) == 1
    assert store.reads == [digest]


def test_the_least_recently_used_image_is_evicted(open_cache: Callable[..., HostCache], digests: tuple[Path, list[str]]) -> None:
    evicted: list[str] = []
    # One worker: another might hold an image a moment longer, which is then in use.
    cache = open_cache(2, num_workers=1, on_evict=evicted.append)
    a, b, c = digests[1][:3]
    fetch(cache, a)
    fetch(cache, b)
    cache.get(a)
    fetch(cache, c)
    assert evicted == [b]
    assert cache.digests() == (a, c)


def test_an_image_over_the_bound_is_delivered_and_not_cached(
    open_cache: Callable[..., HostCache], digests: tuple[Path, list[str]]
) -> None:
    cache = open_cache(0.5)
    assert isinstance(fetch(cache, digests[1][0]), AdapterImage)
    assert cache.digests() == ()
    assert cache.size_bytes == 0


def test_what_is_evicted_but_in_use_keeps_its_memory_and_the_bound_holds(
    open_cache: Callable[..., HostCache], digests: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(2, num_workers=1)
    in_use = [fetch(cache, digest) for digest in digests[1][:2]]
    contents = [image.pages.clone() for image in in_use if isinstance(image, AdapterImage)]
    third = fetch(cache, digests[1][2])
    assert isinstance(third, AdapterImage), "it is delivered all the same"
    assert "no room in the host cache" in caplog.text
    assert cache.digests() == tuple(digests[1][:2]), "who is in use stays, for going would make no room"
    for image, content in zip(in_use, contents, strict=True):
        assert isinstance(image, AdapterImage) and image.pages.equal(content)
    del in_use[0], image
    assert isinstance(fetch(cache, digests[1][2]), AdapterImage)
    assert cache.digests() == (digests[1][1], digests[1][2])


def test_a_damaged_image_gives_its_memory_back(open_cache: Callable[..., HostCache], digests: tuple[Path, list[str]]) -> None:
    cache, path = open_cache(1, num_workers=1), digests[0] / f"{digests[1][0]}.image"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert isinstance(fetch(cache, digests[1][0]), AdapterCorruptError)
    finally:
        path.write_bytes(whole)
    assert isinstance(fetch(cache, digests[1][1]), AdapterImage)
    assert cache.digests() == (digests[1][1],)


def test_an_error_is_delivered_and_the_next_fetch_tries_again(
    open_cache: Callable[..., HostCache],
    store: SlowStore,
    digests: tuple[Path, list[str]],
    make_image: Callable[[int], AdapterImage],
) -> None:
    cache, image = open_cache(2), make_image(99)
    assert isinstance(fetch(cache, image.digest), ImageNotFoundError)
    path = digests[0] / f"{image.digest}.image"
    path.write_bytes(b"not an image")
    try:
        assert isinstance(fetch(cache, image.digest), AdapterCorruptError)
        path.unlink()
        store.publish(image)
        assert isinstance(fetch(cache, image.digest), AdapterImage)
    finally:
        store.delete(image.digest)


def test_one_callback_that_fails_costs_the_others_nothing(
    open_cache: Callable[..., HostCache], store: SlowStore, digests: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    cache, digest = open_cache(2), digests[1][0]
    done: Queue[AdapterImage | Exception] = Queue()

    def fail(_: str, __: AdapterImage | Exception) -> None:
        raise RuntimeError("a bug of the caller")

    store.gate.clear()
    cache.fetch(digest, fail)
    cache.fetch(digest, lambda _, result: done.put(result))
    store.gate.set()
    assert isinstance(done.get(timeout=30), AdapterImage)
    assert f"fetch callback failed digest={digest}" in caplog.text


def test_the_queue_of_fetches_is_bounded(
    open_cache: Callable[..., HostCache],
    store: SlowStore,
    digests: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapter_store.host_cache.MAX_PENDING_FETCHES", 2)
    cache = open_cache(2, num_workers=1)
    done: Queue[AdapterImage | Exception] = Queue()
    store.gate.clear()
    for digest in digests[1][:3]:
        cache.fetch(digest, lambda _, result: done.put(result))
    refused = done.get(timeout=30)
    assert isinstance(refused, StoreFullError)
    assert "2 fetches wait already; the limit is 2" in str(refused)
    store.gate.set()
    assert all(isinstance(done.get(timeout=30), AdapterImage) for _ in range(2))


def test_after_close_a_fetch_is_refused_at_once(open_cache: Callable[..., HostCache], digests: tuple[Path, list[str]]) -> None:
    cache = open_cache(2)
    cache.close()
    assert isinstance(fetch(cache, digests[1][0]), StoreFullError)


@settings(max_examples=25, deadline=None)
@given(
    capacity=st.sampled_from([0.5, 1, 2.5, 4]),
    moves=st.lists(st.tuples(st.sampled_from(["fetch", "get"]), st.integers(0, NUM_IMAGES - 1)), max_size=30),
)
def test_the_cache_equals_a_simple_model_whatever_is_asked(
    capacity: float, moves: list[tuple[str, int]], geometry: BaseGeometry, digests: tuple[Path, list[str]]
) -> None:
    store = ImageStore(digests[0])
    size = store.read_header(digests[1][0]).size_bytes
    cache = HostCache(store, geometry, int(size * capacity), num_workers=1)
    model: list[str] = []
    for move, number in moves:
        digest = digests[1][number]
        if move == "fetch":
            assert isinstance(fetch(cache, digest), AdapterImage)
        else:
            assert (cache.get(digest) is not None) == (digest in model)
        present = digest in model
        if present:
            model.remove(digest)
        if move == "fetch" or present:
            model.append(digest)
        model = model[max(0, len(model) - int(capacity)) :]
        assert list(cache.digests()) == model
        cache.check_integrity()
    cache.close()
