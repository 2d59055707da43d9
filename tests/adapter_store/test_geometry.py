"""How large a page is: it follows from the base model's shape alone, and every weight row fits into one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape


def _geometry(num_kv_heads: int, head_dim: int, sizes: list[tuple[int, int]]) -> BaseGeometry:
    modules = tuple(LinearShape(name, *size) for name, size in zip(LORA_MODULES, sizes, strict=False))
    return BaseGeometry("base", "f" * 64, "bfloat16", 3, num_kv_heads, head_dim, modules, max_lora_rank=64)


@given(
    st.integers(1, 64),
    st.sampled_from([16, 32, 64, 96, 128, 256]),
    st.lists(st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)), min_size=1, max_size=7),
)
def test_no_weight_row_is_longer_than_a_page_and_no_page_longer_than_needed(
    num_kv_heads: int, head_dim: int, sizes: list[tuple[int, int]]
) -> None:
    geometry = _geometry(num_kv_heads, head_dim, sizes)
    longest = max(max(size) for size in sizes)
    assert geometry.page_elems == 2 * geometry.page_tokens * num_kv_heads * head_dim >= longest
    assert geometry.page_tokens >= 16
    assert geometry.page_tokens & (geometry.page_tokens - 1) == 0, "a power of two"
    assert geometry.page_tokens == 16 or geometry.page_elems // 2 < longest
    assert geometry.page_bytes == 3 * geometry.page_elems * 2


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "longest", "page_tokens"),
    [
        (32, 128, 11_008, 16),  # Llama 2 7B
        (8, 128, 14_336, 16),  # Llama 3 8B
        (4, 128, 18_944, 32),  # Qwen2.5 7B
        (2, 64, 4_864, 32),  # Qwen2.5 0.5B
    ],
)
def test_pages_of_known_models(num_kv_heads: int, head_dim: int, longest: int, page_tokens: int) -> None:
    assert _geometry(num_kv_heads, head_dim, [(longest, 64)]).page_tokens == page_tokens


@given(st.integers(0, 10_000))
def test_tokens_take_as_few_pages_as_hold_them(num_tokens: int) -> None:
    geometry = _geometry(2, 64, [(64, 4_864)])
    num_pages = geometry.num_kv_pages(num_tokens)
    assert (num_pages - 1) * geometry.page_tokens < num_tokens <= num_pages * geometry.page_tokens or num_tokens == num_pages == 0
