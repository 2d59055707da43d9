"""Attention over the page pool: the interface that backends implement.

Knows pages and slots as numbers; nothing of requests, of what else lies in the pool, or of the model around it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from dataplane.model.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is known of a model's attention before its first step.

    windows: the sliding windows of its layers, None for those that attend to all tokens.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    windows: frozenset[int | None]


@dataclass(frozen=True, slots=True)
class KvPages:
    """K and V of one layer, strided views of the pool.

    k, v: [num_pages, page_tokens, num_kv_heads, head_dim] dtype of the pool.
    """

    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def of(layer_pool: torch.Tensor, num_kv_heads: int, head_dim: int) -> "KvPages":
        """layer_pool: [num_pages, page_elems]; a page holds [2, page_tokens, num_kv_heads, head_dim]."""
        k, v = layer_pool.view(len(layer_pool), 2, -1, num_kv_heads, head_dim).unbind(1)
        return KvPages(k, v)


class AttentionPlan:
    """What a backend derived from one step's inputs; built once a step, used by every layer."""


class AttentionBackend(ABC):
    """Writes K and V of a step's tokens into the pool and attends to what the page tables name.

    A step has P rows, of which the first T are tokens and the others padding.
    """

    @property
    def can_be_captured(self) -> bool:
        """Whether `append` and the attention of `for_decode_graphs` may be captured in CUDA graphs."""
        return False

    def for_decode_graphs(self, max_rows: int, max_pages: int, padding_page: int) -> "AttentionBackend":
        """A backend for steps of decodes alone whose `attend` launches the same for every step of P rows.

        A captured graph computes, at each replay, what was planned last for P rows; a padding row attends to one token of the
        padding page. Only one plan lives at a time, this backend's or the other's.

        max_rows, max_pages: of the largest step, padding included.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be captured")

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor, pages: KvPages, inputs: StepInputs) -> None:
        """Writes the rows' keys and values to their slots, padding rows' too.

        k, v: [P, num_kv_heads, head_dim] dtype of the pool, rotary positions applied.
        """

    @abstractmethod
    def plan(self, inputs: StepInputs, q: torch.Tensor, out: torch.Tensor) -> AttentionPlan:
        """Prepares one step. Ends what was planned before.

        q: [P, num_heads, head_dim] where every layer leaves its queries, rotary positions applied.
        out: [P, num_heads, head_dim] where attention goes.
        """

    @abstractmethod
    def attend(self, plan: AttentionPlan, pages: KvPages, sliding_window: int | None) -> None:
        """Attends causally through the page tables, to the step's own tokens too. What it leaves in padding rows is unspecified.

        Semantics: out[t, h] = softmax(q[t, h] @ K[:, h // (num_heads // num_kv_heads)].T / sqrt(head_dim)) @ V over the
            tokens of t's request at positions <= positions[t], with a window w also > positions[t] - w.
        """
