"""A dummy is an image like any other: the same limits, the same layout, and weights that follow from its fields."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_store.dummy_adapter import BASE_MODEL, PIECE_ELEMS, DummyAdapter, build_dummy
from adapter_store.errors import AdapterRejectedError
from adapter_store.geometry import BaseGeometry
from adapter_store.image import AdapterOrigin, ModuleWeights, build_image, image_digest, unpack_module
from adapter_store.image_store import ImageStore

DUMMY = DummyAdapter(rank=4, target_modules=("q_proj", "v_proj", "down_proj"), seed=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_small_finite_and_differ_by_row_and_layer(make_geometry: Callable[[str], BaseGeometry], dtype: str) -> None:
    image = build_dummy(DUMMY, make_geometry(dtype))
    rows = []
    for name in DUMMY.target_modules:
        for layer in range(image.header.num_layers):
            lora_a, lora_b_t = unpack_module(image, layer, name)
            rows += [tuple(row.tolist()) for row in (*lora_a, *lora_b_t)]
    assert len(set(rows)) == len(rows)
    values = torch.tensor([value for row in rows for value in row])
    assert values.abs().max() <= 1 / 64
    assert 0.005 < values.std() < 0.02


def test_its_header_is_that_of_an_imported_adapter_of_the_same_shape(geometry: BaseGeometry) -> None:
    weights = {name: ModuleWeights(DUMMY.rank, 1.0, {}, {}) for name in reversed(DUMMY.target_modules)}
    imported = build_image(geometry, weights, AdapterOrigin(BASE_MODEL, DUMMY.rank, False))
    assert build_dummy(DUMMY, geometry).header == imported.header


def test_equal_fields_give_equal_weights_and_any_other_seed_other_ones(geometry: BaseGeometry) -> None:
    image = build_dummy(DUMMY, geometry)
    assert build_dummy(DUMMY, geometry).digest == image.digest == image_digest(image.header, image.pages)
    # Across versions of this code too: a benchmark may be repeated later.
    assert image.digest == "b11c6dfe4386946426ceba922ec5fb223fb3c65d55ae95164538347c1363078d"
    digests = {build_dummy(replace(DUMMY, seed=seed), geometry).digest for seed in (*range(50), (1 << 64) - 1)}
    assert len(digests) == 51


def test_an_image_larger_than_a_piece_is_filled_to_its_end(geometry: BaseGeometry) -> None:
    large = replace(geometry, num_layers=40)
    image = build_dummy(replace(DUMMY, rank=16), large)
    assert image.pages.numel() > 2 * PIECE_ELEMS
    assert image.pages.numel() % PIECE_ELEMS
    assert all(layer.count_nonzero() > 0.9 * layer.numel() for layer in image.pages)


def test_the_base_refuses_what_it_cannot_take_all_of_it_by_name(geometry: BaseGeometry) -> None:
    small = replace(geometry, modules=geometry.modules[:2], max_lora_rank=8)
    with pytest.raises(AdapterRejectedError) as caught:
        build_dummy(DummyAdapter(9, ("q_proj", "o_proj", "lm_head"), 0), small)
    assert {(v.kind, v.subject) for v in caught.value.violations} == {
        ("UNSUPPORTED_MODULE", "o_proj"),
        ("UNSUPPORTED_MODULE", "lm_head"),
        ("RANK_LIMIT", "rank"),
    }
    with pytest.raises(AdapterRejectedError, match="target_modules: is empty"):
        build_dummy(DummyAdapter(4, (), 0), small)


def test_it_comes_back_from_the_store_as_it_was_made(geometry: BaseGeometry, tmp_path: Path) -> None:
    image, store = build_dummy(DUMMY, geometry), ImageStore(tmp_path)
    store.publish(image)
    assert torch.equal(store.read(image.digest, geometry).pages, image.pages)
