"""Fixed slots: a whole one for each adapter, and no page that goes from KV to adapters or back."""

from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from adapter_store.image import AdapterImage, AdapterOrigin, ModuleWeights, build_image, unpack_module
from benchmarks.baselines.fixed_slots import FixedSlots, slot_pages
from dataplane.memory.adapter_copy import TensorCopier
from dataplane.memory.adapter_states import Readiness
from dataplane.memory.host_images import FetchResult
from dataplane.memory.page_pool import PageKind, PageOwner, PagePool
from dataplane.memory.pool_sizing import PoolTooSmallError
from dataplane.memory.residency import Residency

GEOMETRY = BaseGeometry(
    model_name="base",
    fingerprint="f",
    dtype="float32",
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    modules=tuple(LinearShape(name, 32, 32) for name in LORA_MODULES),
    max_lora_rank=8,
)
MODULES = ("q_proj", "v_proj")
NUM_SLOTS = 2
NUM_KV_PAGES = 5
# 2 modules of 2 * 8 rows of 32 elements, in pages of 2 * 16 * 8.
SLOT_PAGES = 4
KV = PageOwner(PageKind.KV, 1)


def image(number: int, rank: int, modules: tuple[str, ...] = MODULES) -> AdapterImage:
    torch.manual_seed(number)
    weights = {
        name: ModuleWeights(
            rank,
            1.0,
            {layer: torch.randn(rank, 32) for layer in range(2)},
            {layer: torch.randn(32, rank) for layer in range(2)},
        )
        for name in modules
    }
    return build_image(GEOMETRY, weights, AdapterOrigin("base", 1.0, False))


class Host:
    """Host memory that has every image at once."""

    def __init__(self, images: list[AdapterImage]) -> None:
        self._images = {image.digest: image for image in images}

    def fetch(self, digest: str, on_done: Callable[[str, FetchResult], None]) -> None:
        on_done(digest, self._images[digest])

    def get(self, digest: str) -> AdapterImage | None:
        return self._images.get(digest)

    def digests(self) -> tuple[str, ...]:
        return tuple(self._images)


class World:
    """KV, slots and the pool that they share."""

    def __init__(self, images: list[AdapterImage]) -> None:
        num_pages = NUM_KV_PAGES + NUM_SLOTS * SLOT_PAGES
        self.tensor = torch.full((2, num_pages, GEOMETRY.page_elems), torch.nan)
        self._fetched: list[tuple[str, FetchResult]] = []
        self.kv: PagePool
        self.adapters: Residency
        self.kv, self.adapters = FixedSlots(NUM_SLOTS, MODULES)(
            GEOMETRY, num_pages, Host(images), TensorCopier(self.tensor), lambda *fetched: self._fetched.append(fetched)
        )

    def prepare(self, digest: str) -> Readiness:
        """As the engine does each step."""
        self.complete_fetches()
        self.adapters.poll_copies()
        return self.adapters.prepare(digest, may_allocate=True)

    def complete_fetches(self) -> list[str | None]:
        fetched, self._fetched = self._fetched, []
        return [self.adapters.complete_fetch(*each) for each in fetched]

    def check(self) -> None:
        self.kv.check_integrity()
        self.adapters.check_integrity()

    def pages_of(self, digest: str) -> set[int]:
        """Pages in which rows of an adapter on the device lie."""
        rows = self.adapters.adapter(digest).modules.values()
        return {offset // GEOMETRY.page_elems for r in rows for offset in (*r.a_rows.tolist(), *r.b_rows.tolist())}


def test_a_slot_is_as_large_as_the_largest_adapter() -> None:
    assert slot_pages(GEOMETRY, MODULES) == SLOT_PAGES == image(0, 8).num_pages
    assert slot_pages(GEOMETRY, ()) == image(0, 8, LORA_MODULES).num_pages


def test_a_small_adapter_takes_a_whole_slot_and_is_found_there() -> None:
    images = [image(number, rank) for number, rank in enumerate((1, 8, 3))]
    world = World(images)
    for each in images[:2]:
        world.adapters.acquire(each.digest)
        assert world.prepare(each.digest) is Readiness.READY
        rows = world.adapters.adapter(each.digest).modules["v_proj"]
        flat = world.tensor[1].view(-1)
        lora_a, _ = unpack_module(each, 1, "v_proj")
        assert torch.equal(torch.stack([flat[start : start + 32] for start in rows.a_rows.tolist()]), lora_a)
    first, second = (world.pages_of(each.digest) for each in images[:2])
    assert min(first | second) >= NUM_KV_PAGES and first.isdisjoint(second)
    world.adapters.acquire(images[2].digest)
    assert world.prepare(images[2].digest) is Readiness.STARVED, "the first leaves three quarters of its slot to nobody"
    world.adapters.release(images[1].digest)
    assert world.prepare(images[2].digest) is Readiness.READY
    assert world.pages_of(images[2].digest) <= second
    world.check()


def test_kv_and_adapters_do_not_help_each_other_out() -> None:
    images = [image(number, 2) for number in range(3)]
    world = World(images)
    pages = world.kv.allocate(NUM_KV_PAGES, KV)
    assert pages == tuple(range(NUM_KV_PAGES)) and world.kv.allocate(1, KV) is None
    for each in images:  # with not one page of KV free, the third evicts an idle one
        world.adapters.acquire(each.digest)
        assert world.prepare(each.digest) is Readiness.READY
        world.adapters.release(each.digest)
    assert world.adapters.num_idle_pages == 0 == world.kv.num_free
    world.check()


def test_what_will_be_needed_soon_is_brought_into_slots_that_nobody_uses() -> None:
    images = [image(number, 2) for number in range(3)]
    world = World(images)
    world.adapters.acquire(images[0].digest)
    assert world.prepare(images[0].digest) is Readiness.READY
    world.adapters.set_prefetch([each.digest for each in images[1:]])
    for _ in range(3):
        world.adapters.advance_prefetch(num_reserved_pages=100)
        world.complete_fetches()
        world.adapters.poll_copies()
    for each, readiness in zip(images[:2], (Readiness.READY, Readiness.READY), strict=True):
        world.adapters.acquire(each.digest)
        assert world.adapters.prepare(each.digest, may_allocate=False) is readiness
    world.check()


def test_an_adapter_larger_than_a_slot_is_refused_with_both_sizes() -> None:
    large = image(0, 8, ("q_proj", "k_proj", "v_proj"))
    world = World([large])
    world.adapters.acquire(large.digest)
    (error,) = world.complete_fetches()
    assert error == f"adapter {large.digest} takes 6 pages, a slot has 4; see --max-lora-rank and --slot-modules"


def test_slots_that_leave_nothing_for_kv_are_refused() -> None:
    with pytest.raises(PoolTooSmallError, match="2 slots of 4 pages leave nothing for KV in a pool of 8"):
        FixedSlots(NUM_SLOTS, MODULES)(GEOMETRY, 8, Host([]), TensorCopier(torch.zeros(2, 8, 256)), lambda *fetched: None)


@hypothesis.given(moves=st.lists(st.tuples(st.sampled_from(["acquire", "release", "step", "kv", "free"]), st.integers(0, 4))))
def test_books_agree_whatever_comes_and_goes(moves: list[tuple[str, int]]) -> None:
    images = [image(number, 1 + number) for number in range(5)]
    world = World(images)
    held = [0] * len(images)
    kv: list[tuple[int, ...]] = []
    for move, number in moves:
        digest = images[number].digest
        if move == "acquire":
            world.adapters.acquire(digest)
            held[number] += 1
        elif move == "release" and held[number]:
            world.adapters.release(digest)
            held[number] -= 1
        elif move == "step":
            used = [i for i, count in enumerate(held) if count]
            ready = [i for i in used if world.prepare(images[i].digest) is Readiness.READY]
            assert len(ready) == min(len(used), NUM_SLOTS)
            world.adapters.set_prefetch([digest])
            world.adapters.advance_prefetch(len(used))
        elif move == "kv":
            pages = world.kv.allocate(number, KV)
            kv += [pages] if pages else []
        elif move == "free" and kv:
            world.kv.free(kv.pop(), KV)
        world.check()
