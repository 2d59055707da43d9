"""The torch attention backend against a naive fp64 reference over scattered pages of garbage."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dataplane.attention import torch_attention
from dataplane.attention.torch_attention import TorchAttention

PAGE_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_PAGES = 16, 6, 2, 8, 64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Make = Callable[..., "Sequences"]


class Sequences:
    """Requests with known K and V of every token, whose first tokens already lie in scattered pages of a pool of NaN."""

    def __init__(
        self,
        step_inputs: Callable[..., Any],
        attention: Callable[..., list[torch.Tensor]],
        context_lens: list[int],
        num_rows: list[int],
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        free = random.Random(seed).sample(range(NUM_PAGES), NUM_PAGES)
        self.pool = torch.full((NUM_PAGES, 2, PAGE_TOKENS, NUM_KV_HEADS, HEAD_DIM), torch.nan)
        self.kv, self.tables = [], []
        for context_len, rows in zip(context_lens, num_rows, strict=True):
            kv = torch.randn(2, context_len, NUM_KV_HEADS, HEAD_DIM, generator=generator)
            table = tuple(free.pop() for _ in range(-(-context_len // PAGE_TOKENS)))
            for i in range(context_len - rows):
                self.pool[table[i // PAGE_TOKENS], :, i % PAGE_TOKENS] = kv[:, i]
            self.kv.append(kv)
            self.tables.append(table)
        self.num_rows = num_rows
        self.pool = self.pool.to(device)
        self.q = torch.randn(sum(num_rows), NUM_HEADS, HEAD_DIM, generator=generator)
        self.inputs = step_inputs(list(zip(context_lens, num_rows, strict=True)), self.tables, PAGE_TOKENS, device)
        self._attention = attention

    def run(self, sliding_window: int | None) -> torch.Tensor:
        """The backend's output, on the CPU."""
        new = torch.cat([kv[:, kv.shape[1] - n :] for kv, n in zip(self.kv, self.num_rows, strict=True)], dim=1)
        k, v = new.to(self.pool.device)
        tensors = (self.q.to(self.pool.device), k, v)
        return self._attention(TorchAttention(PAGE_TOKENS), self.inputs, tensors, self.pool, sliding_window)[0].cpu()

    def expected(self, sliding_window: int | None) -> torch.Tensor:
        """Token by token and head by head in fp64."""
        out = torch.empty(self.q.shape, dtype=torch.float64)
        host = self.inputs.host
        for r, kv in enumerate(self.kv):
            for row in range(host.query_starts[r], host.query_starts[r + 1]):
                position = int(host.positions[row])
                begin = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                for head in range(NUM_HEADS):
                    k, v = kv[:, begin : position + 1, head // (NUM_HEADS // NUM_KV_HEADS)].double()
                    scores = k @ self.q[row, head].double() / HEAD_DIM**0.5
                    out[row, head] = scores.softmax(0) @ v
        return out


@pytest.fixture
def make(step_inputs: Callable[..., Any], attention: Callable[..., list[torch.Tensor]]) -> Make:
    """Makes sequences."""
    return lambda *args, **kwargs: Sequences(step_inputs, attention, *args, **kwargs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sliding_window", [None, 1, 5, 16, 23, 500])
def test_attention_reads_exactly_the_tokens_of_each_request(sliding_window: int | None, device: str, make: Make) -> None:
    # whole prompts, chunks, decodes; page borders before, at and after; two requests of one shape
    sequences = make([1, 16, 17, 40, 33, 50, 50, 64, 2], [1, 16, 17, 7, 1, 1, 1, 1, 1], device)
    torch.testing.assert_close(sequences.run(sliding_window).double(), sequences.expected(sliding_window), atol=1e-5, rtol=1e-5)


def test_a_request_has_the_same_bits_alone_and_in_any_batch(make: Make) -> None:
    alone = make([37], [3])
    mixed = make([37, 40, 37, 5], [3, 3, 3, 5])
    mixed.q[:3], mixed.kv[0] = alone.q, alone.kv[0]
    for i in range(37):
        mixed.pool[mixed.tables[0][i // PAGE_TOKENS], :, i % PAGE_TOKENS] = alone.kv[0][:, i]
    assert torch.equal(mixed.run(None)[:3], alone.run(None))


def test_a_bounded_gather_changes_nothing(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    lens, rows = [20] * 7 + [48], [1] * 7 + [2]
    unbounded = make(lens, rows).run(None)
    monkeypatch.setattr(torch_attention, "MAX_GATHERED_TOKENS", 64)
    assert torch.equal(make(lens, rows).run(None), unbounded)


def test_a_window_leaves_pages_before_it_unread(make: Make) -> None:
    sequences = make([60], [2])
    sequences.pool[list(sequences.tables[0][:2])] = torch.nan
    assert torch.isfinite(sequences.run(20)).all()
    assert not torch.isfinite(sequences.run(None)).all()


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else(make: Make) -> None:
    sequences = make([18, 5], [3, 1])
    before = sequences.pool.clone()
    sequences.run(None)
    changed = {tuple(at) for at in (~torch.isnan(sequences.pool) & torch.isnan(before)).any(-1).any(-1).any(1).nonzero().tolist()}
    slots = torch.from_numpy(sequences.inputs.host.slots).long()
    assert changed == {divmod(int(slot), PAGE_TOKENS) for slot in slots}
    written = sequences.pool[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS]
    expected = torch.cat([kv[:, kv.shape[1] - n :] for kv, n in zip(sequences.kv, [3, 1], strict=True)], dim=1)
    assert torch.equal(written.transpose(0, 1), expected)


def test_a_backend_that_cannot_be_captured_says_so() -> None:
    backend = TorchAttention(PAGE_TOKENS)
    assert not backend.can_be_captured
    with pytest.raises(NotImplementedError, match="TorchAttention cannot be captured"):
        backend.for_decode_graphs(1, 1, 0)
