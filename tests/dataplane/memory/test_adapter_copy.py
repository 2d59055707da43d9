"""An image copied into scattered pages: the row table must find every row again, and nobody else may notice the copy."""

import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from adapter_store.image import AdapterImage, AdapterOrigin, ModuleWeights, build_image, unpack_module
from dataplane.memory.adapter_copy import TensorCopier, row_table
from kernels.lora import LoraRows

GEOMETRY = BaseGeometry(
    model_name="base",
    fingerprint="f",
    dtype="float32",
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    modules=tuple(LinearShape(name, 24 + 8 * i, 64 - 8 * i) for i, name in enumerate(LORA_MODULES)),
    max_lora_rank=16,
)


def _image(ranks: dict[str, int], seed: int) -> AdapterImage:
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> dict[int, torch.Tensor]:
        return {layer: torch.randn(rows, columns, generator=generator) for layer in range(GEOMETRY.num_layers)}

    shapes = {shape.name: shape for shape in GEOMETRY.modules}
    weights = {
        name: ModuleWeights(rank, 0.5 * rank, random(rank, shapes[name].in_features), random(shapes[name].out_features, rank))
        for name, rank in ranks.items()
    }
    return build_image(GEOMETRY, weights, AdapterOrigin("base", 1.0, False))


def _check_rows(pool: torch.Tensor, layer: int, rows: LoraRows, image: AdapterImage, name: str) -> None:
    flat = pool[layer].view(-1).cpu()
    table = image.header.modules[name]
    lora_a, lora_b_t = unpack_module(image, layer, name)
    assert (rows.rank, rows.scaling) == (table.rank, table.scaling)
    assert torch.equal(torch.stack([flat[o : o + table.in_features] for o in rows.a_rows.tolist()]), lora_a)
    assert torch.equal(torch.stack([flat[o : o + table.out_features] for o in rows.b_rows.tolist()]), lora_b_t)


def _check_copy(device: str, ranks: dict[str, int], seed: int, num_spare_pages: int) -> None:
    image = _image(ranks, seed)
    num_pages = image.num_pages + num_spare_pages
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))[: image.num_pages].tolist()
    pool = torch.full((GEOMETRY.num_layers, num_pages, GEOMETRY.page_elems), 7.0, device=device)
    copy = TensorCopier(pool).start(image, pages)
    copy.wait()
    assert copy.is_done()
    assert copy.adapter.modules.keys() == ranks.keys()
    for name, rows in copy.adapter.modules.items():
        for layer in range(GEOMETRY.num_layers):
            _check_rows(pool, layer, rows, image, name)
    untouched = sorted(set(range(num_pages)) - set(pages))
    assert bool((pool[:, untouched] == 7.0).all()), "a page of somebody else was written"


@given(
    ranks=st.dictionaries(st.sampled_from(LORA_MODULES), st.integers(1, 9), min_size=1),
    seed=st.integers(0, 99),
    num_spare_pages=st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_every_row_is_found_where_the_table_says(ranks: dict[str, int], seed: int, num_spare_pages: int) -> None:
    _check_copy("cpu", ranks, seed, num_spare_pages)


@given(
    ranks=st.dictionaries(st.sampled_from(LORA_MODULES), st.integers(1, 16), min_size=1),
    data=st.data(),
)
@settings(max_examples=30)
def test_the_row_table_moves_each_offset_with_its_page(ranks: dict[str, int], data: st.DataObject) -> None:
    image = _image(ranks, 0)
    pages = data.draw(st.lists(st.integers(0, 2**40), min_size=image.num_pages, max_size=image.num_pages, unique=True))
    size = GEOMETRY.page_elems
    offsets = [o for module in image.header.modules.values() for o in (*module.a_offsets, *module.b_offsets)]
    assert row_table(image, pages).tolist() == [pages[o // size] * size + o % size for o in offsets]


@pytest.mark.gpu
def test_every_row_is_found_on_the_device() -> None:
    for seed in range(5):
        _check_copy("cuda", {"q_proj": 3, "down_proj": 7, "v_proj": 1}, seed, 3)


def _pool(num_pages: int) -> torch.Tensor:
    return torch.zeros(GEOMETRY.num_layers, num_pages, GEOMETRY.page_elems, device="cuda")


def _busy() -> None:
    """Keeps the compute stream busy for about half a second."""
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _holds(pool: torch.Tensor, pages: Sequence[int], image: AdapterImage) -> bool:
    return torch.equal(pool[:, list(pages)].cpu(), image.pages)


@pytest.mark.gpu
def test_a_copy_waits_for_the_steps_before_it_and_nobody_waits_for_the_copy() -> None:
    pool, image = _pool(40), _image({"q_proj": 9}, 0)
    pages = range(3, 3 + image.num_pages)
    TensorCopier(pool).start(image, pages).wait()  # what is made at the first use
    copier, read = TensorCopier(pool.fill_(7)), torch.empty_like(pool)
    torch.cuda.synchronize()
    _busy()
    read.copy_(pool)
    copy = copier.start(image, pages)
    assert not copy.is_done(), "start came back while the device was busy"
    copy.wait()
    assert bool((read == 7).all()), "a step that was launched before saw the pages change"
    assert _holds(pool, pages, image)


@pytest.mark.gpu
def test_pages_of_a_joined_copy_hold_what_is_written_next() -> None:
    pool, image = _pool(40), _image({"q_proj": 9}, 0)
    copier, pages = TensorCopier(pool), range(3, 3 + image.num_pages)
    other = _image({"q_proj": 9}, 1)
    _busy()
    copier.start(image, pages).join()
    pool[:, pages.start : pages.stop].fill_(5)
    torch.cuda.synchronize()
    assert bool((pool[:, pages.start : pages.stop] == 5).all())
    _busy()
    copier.start(image, pages).join()
    copier.start(other, pages).wait()
    assert _holds(pool, pages, other)


@pytest.mark.gpu
def test_what_is_launched_after_a_join_finds_the_weights_and_their_source_is_held_until_then() -> None:
    pool, image = _pool(40), _image({"q_proj": 9}, 0)
    copier, pages = TensorCopier(pool), range(3, 3 + image.num_pages)
    pinned = AdapterImage(image.digest, image.header, image.pages.pin_memory())
    source = weakref.ref(pinned)
    _busy()
    copy = copier.start(pinned, pages)
    copy.join()
    assert copy.is_done()
    read = pool[:, pages.start : pages.stop].clone()
    del copy, pinned
    assert source() is not None, "the device has not read it yet"
    torch.cuda.synchronize()
    assert torch.equal(read.cpu(), image.pages)
    copier.start(image, pages).wait()
    assert source() is None


@pytest.mark.gpu
def test_once_done_the_source_may_be_overwritten() -> None:
    pool, image = _pool(40), _image({"q_proj": 9, "o_proj": 4}, 0)
    copier, pages, expected = TensorCopier(pool), list(range(image.num_pages)), image.pages.clone()
    pinned = AdapterImage(image.digest, image.header, image.pages.pin_memory())
    copy = copier.start(pinned, pages)
    copy.wait()
    pinned.pages.zero_()
    assert torch.equal(pool[:, pages].cpu(), expected)


@pytest.mark.gpu
def test_copies_and_kernels_on_other_pages_do_not_disturb_each_other() -> None:
    images = [_image({"q_proj": 9, "up_proj": rank}, rank) for rank in range(1, 9)]
    images = [AdapterImage(image.digest, image.header, image.pages.pin_memory()) for image in images]
    num_pages = sum(image.num_pages for image in images)
    pool = _pool(2 * num_pages)
    copier = TensorCopier(pool)
    order = torch.randperm(2 * num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    kernel_pages = torch.tensor(order[num_pages:], device="cuda")
    copies, first = [], 0
    for image in images:
        pages = order[first : first + image.num_pages]
        first += image.num_pages
        copies.append((copier.start(image, pages), image, pages))
        pool.index_add_(1, kernel_pages, torch.ones(GEOMETRY.num_layers, num_pages, GEOMETRY.page_elems, device="cuda"))
    for copy, image, pages in copies:
        copy.wait()
        assert _holds(pool, pages, image)
        for name, rows in copy.adapter.modules.items():
            _check_rows(pool, 1, rows, image, name)
    assert bool((pool[:, kernel_pages] == len(images)).all())
