"""Packing is a pure function of ranks and geometry, and no row is lost, moved or overwritten."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.geometry import LORA_MODULES, ROW_ALIGN_BYTES, BaseGeometry, LinearShape
from adapter_store.image import AdapterOrigin, ModuleWeights, build_image, unpack_module
from adapter_store.packing import ImageLayout, pack_rows

RANKS = st.dictionaries(st.sampled_from(LORA_MODULES), st.integers(1, 40), min_size=1)
GEOMETRIES = st.builds(
    lambda dtype, kv_heads, head_dim, sizes: BaseGeometry(
        model_name="any",
        fingerprint="0" * 64,
        dtype=dtype,
        num_layers=2,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        modules=tuple(LinearShape(name, i, o) for name, (i, o) in zip(LORA_MODULES, sizes, strict=True)),
        max_lora_rank=64,
    ),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(1, 3),
    st.sampled_from([8, 16]),
    st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=7, max_size=7),
)


def _rows(layout: ImageLayout) -> list[tuple[int, int]]:
    """(offset, length) of every row."""
    rows: list[tuple[int, int]] = []
    for module in layout.modules.values():
        rows += [(offset, module.in_features) for offset in module.a_offsets]
        rows += [(offset, module.out_features) for offset in module.b_offsets]
    return rows


@settings(max_examples=60, deadline=None)
@given(ranks=RANKS, geometry=GEOMETRIES)
def test_rows_are_aligned_inside_one_page_and_never_overlap(ranks: dict[str, int], geometry: BaseGeometry) -> None:
    layout = pack_rows(ranks, geometry)
    rows = sorted(_rows(layout))
    assert len(rows) == 2 * sum(ranks.values())
    for offset, length in rows:
        assert offset * geometry.dtype_bytes % ROW_ALIGN_BYTES == 0
        assert offset // geometry.page_elems == (offset + length - 1) // geometry.page_elems
    for (offset, length), (following, _) in itertools.pairwise(rows):
        assert offset + length <= following
    assert {offset // geometry.page_elems for offset, _ in rows} == set(range(layout.num_pages))


@settings(max_examples=30, deadline=None)
@given(ranks=RANKS, geometry=GEOMETRIES)
def test_each_row_lies_in_the_first_page_that_had_room(ranks: dict[str, int], geometry: BaseGeometry) -> None:
    align = ROW_ALIGN_BYTES // geometry.dtype_bytes
    used: list[int] = []
    for offset, length in _rows(pack_rows(ranks, geometry)):
        fits = [page for page, elems in enumerate(used) if elems + length <= geometry.page_elems]
        page = fits[0] if fits else len(used)
        used += [0] * (page + 1 - len(used))
        assert offset == page * geometry.page_elems + used[page]
        used[page] = -(-(used[page] + length) // align) * align


@settings(max_examples=30, deadline=None)
@given(ranks=RANKS, geometry=GEOMETRIES)
def test_packing_depends_on_ranks_and_geometry_alone(ranks: dict[str, int], geometry: BaseGeometry) -> None:
    shuffled = dict(reversed(list(ranks.items())))
    assert pack_rows(shuffled, geometry) == pack_rows(ranks, geometry)
    assert list(pack_rows(shuffled, geometry).modules) == [name for name in LORA_MODULES if name in ranks]


@settings(max_examples=30, deadline=None)
@given(ranks=RANKS, geometry=GEOMETRIES, seed=st.integers(0, 2**31))
def test_unpacking_an_image_gives_back_exactly_what_was_packed(ranks: dict[str, int], geometry: BaseGeometry, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, geometry.dtype)
    weights: dict[str, ModuleWeights] = {}
    for name, rank in ranks.items():
        shape = geometry.module(name)
        assert shape is not None
        weights[name] = ModuleWeights(
            rank=rank,
            scaling=1.0,
            # Layer 1 has a lower rank, so that the rest of its rows must be zero.
            lora_a={i: torch.randn(max(1, rank - i), shape.in_features, generator=generator).to(dtype) for i in (0, 1)},
            lora_b={i: torch.randn(shape.out_features, max(1, rank - i), generator=generator).to(dtype) for i in (0, 1)},
        )
    image = build_image(geometry, weights, AdapterOrigin("any", 1.0, False))
    assert image.size_bytes == image.pages.numel() * image.pages.element_size() == image.num_pages * geometry.page_bytes
    total = 0
    for name, module in weights.items():
        for layer in (0, 1):
            lora_a, lora_b_t = unpack_module(image, layer, name)
            kept = module.lora_a[layer].shape[0]
            assert torch.equal(lora_a[:kept], module.lora_a[layer]) and not lora_a[kept:].any()
            assert torch.equal(lora_b_t[:kept], module.lora_b[layer].t()) and not lora_b_t[kept:].any()
            total += int(torch.count_nonzero(lora_a)) + int(torch.count_nonzero(lora_b_t))
    assert total == int(torch.count_nonzero(image.pages)), "something lies between the rows"
