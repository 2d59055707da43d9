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


class AttentionPlan:
    """What a backend derived from one step's inputs; built once a step, used by every layer."""


class AttentionBackend(ABC):
    """Writes K and V of a step's tokens into the pool and attends to what the page tables name."""

    @abstractmethod
    def plan(self, inputs: StepInputs) -> AttentionPlan:
        """Prepares one step."""

    @abstractmethod
    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer_pool: torch.Tensor,
        plan: AttentionPlan,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Writes k and v to their slots, then attends causally. Returns [num_tokens, num_heads, head_dim].

        Semantics: out[t, h] = softmax(q[t, h] @ K[:, h // (num_heads // num_kv_heads)].T / sqrt(head_dim)) @ V over the
            tokens of t's request at positions <= positions[t], with a window w also > positions[t] - w.

        q: [num_tokens, num_heads, head_dim] dtype of the pool, rotary positions applied.
        k, v: [num_tokens, num_kv_heads, head_dim] likewise.
        layer_pool: [num_pages, 2, page_tokens, num_kv_heads, head_dim] one layer of the pool, written in place.
        """
