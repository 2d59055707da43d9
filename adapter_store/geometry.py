"""The shape of a base model as adapters and pages see it, and the page geometry that follows from it (docs/architecture.md).

Imports nothing of ours and no torch: both planes share these types.
"""

from dataclasses import dataclass

# The linear modules of a decoder layer that an adapter may change, in the order in which an image packs them.
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Rows of an image start at multiples of this, so that kernels read them with 16-byte loads.
ROW_ALIGN_BYTES = 16

MIN_PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear module, alike in every decoder layer: y[out_features] = W x[in_features]."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseGeometry:
    """What an adapter must fit, and how large a page is. Equal on both planes for one base model."""

    model_name: str
    fingerprint: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    modules: tuple[LinearShape, ...]
    max_lora_rank: int

    @property
    def kv_dim(self) -> int:
        """Elements of K (or V) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def page_tokens(self) -> int:
        """Tokens of KV per page: at least 16, and so many that the longest weight row fits in a page."""
        longest = max(max(m.in_features, m.out_features) for m in self.modules)
        needed = -(-longest // (2 * self.kv_dim))
        return max(MIN_PAGE_TOKENS, 1 << (needed - 1).bit_length())

    @property
    def page_elems(self) -> int:
        """Elements of one page in one layer: K and V of `page_tokens` tokens."""
        return 2 * self.page_tokens * self.kv_dim

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.num_layers * self.page_elems * self.dtype_bytes

    def module(self, name: str) -> LinearShape | None:
        """The module of that name, or None if this base has none."""
        return next((m for m in self.modules if m.name == name), None)

    def num_kv_pages(self, num_tokens: int) -> int:
        """Pages that hold the KV of that many tokens."""
        return -(-num_tokens // self.page_tokens)
