"""An image copied into scattered pages: the row table must find every row again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from adapter_store.image import AdapterImage, AdapterOrigin, ModuleWeights, build_image, unpack_module
from dataplane.memory.adapter_copy import TensorCopier
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


@pytest.mark.gpu
def test_every_row_is_found_on_the_device() -> None:
    for seed in range(5):
        _check_copy("cuda", {"q_proj": 3, "down_proj": 7, "v_proj": 1}, seed, 3)
