"""The torch attention backend against a naive fp64 reference over scattered pages of garbage."""

import random

import pytest
import torch

from dataplane.attention import torch_attention
from dataplane.attention.torch_attention import TorchAttention
from dataplane.model.step_inputs import StepInputs

PAGE_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_PAGES = 16, 6, 2, 8, 64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Sequences:
    """Requests with known K and V of every token, whose first tokens already lie in scattered pages of a pool of NaN."""

    def __init__(self, context_lens: list[int], num_rows: list[int], device: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        free = random.Random(seed).sample(range(NUM_PAGES), NUM_PAGES)
        self.pool = torch.full((NUM_PAGES, 2, PAGE_TOKENS, NUM_KV_HEADS, HEAD_DIM), torch.nan)
        self.kv, slots, tables, starts = [], [], [], [0]
        for context_len, rows in zip(context_lens, num_rows, strict=True):
            kv = torch.randn(2, context_len, NUM_KV_HEADS, HEAD_DIM, generator=generator)
            table = tuple(free.pop() for _ in range(-(-context_len // PAGE_TOKENS)))
            of_token = [table[i // PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS for i in range(context_len)]
            for i in range(context_len - rows):
                self.pool[of_token[i] // PAGE_TOKENS, :, of_token[i] % PAGE_TOKENS] = kv[:, i]
            self.kv.append(kv)
            slots += of_token[context_len - rows :]
            tables.append(table)
            starts.append(starts[-1] + rows)
        self.num_rows = num_rows
        self.pool = self.pool.to(device)
        self.q = torch.randn(starts[-1], NUM_HEADS, HEAD_DIM, generator=generator)
        positions = [p for c, n in zip(context_lens, num_rows, strict=True) for p in range(c - n, c)]
        self.inputs = StepInputs(
            token_ids=torch.zeros(starts[-1], dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            query_starts=tuple(starts),
            context_lens=tuple(context_lens),
            page_tables=tuple(tables),
            logits_rows=torch.zeros(0, dtype=torch.int64, device=device),
            adapter_index=(-1,) * starts[-1],
            adapters=(),
        )

    def run(self, sliding_window: int | None) -> torch.Tensor:
        """The backend's output, on the CPU."""
        new = torch.cat([kv[:, kv.shape[1] - n :] for kv, n in zip(self.kv, self.num_rows, strict=True)], dim=1)
        k, v = new.to(self.pool.device)
        backend = TorchAttention(PAGE_TOKENS)
        q = self.q.to(self.pool.device)
        return backend.run(q, k, v, self.pool, backend.plan(self.inputs), sliding_window).cpu()

    def expected(self, sliding_window: int | None) -> torch.Tensor:
        """Token by token and head by head in fp64."""
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for r, kv in enumerate(self.kv):
            first = self.inputs.query_starts[r]
            for row in range(first, self.inputs.query_starts[r + 1]):
                position = int(self.inputs.positions[row])
                begin = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                for head in range(NUM_HEADS):
                    k, v = kv[:, begin : position + 1, head // (NUM_HEADS // NUM_KV_HEADS)].double()
                    scores = k @ self.q[row, head].double() / HEAD_DIM**0.5
                    out[row, head] = scores.softmax(0) @ v
        return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sliding_window", [None, 1, 5, 16, 23, 500])
def test_attention_reads_exactly_the_tokens_of_each_request(sliding_window: int | None, device: str) -> None:
    # whole prompts, chunks, decodes; page borders before, at and after; two requests of one shape
    sequences = Sequences([1, 16, 17, 40, 33, 50, 50, 64, 2], [1, 16, 17, 7, 1, 1, 1, 1, 1], device)
    torch.testing.assert_close(sequences.run(sliding_window).double(), sequences.expected(sliding_window), atol=1e-5, rtol=1e-5)


def test_a_request_has_the_same_bits_alone_and_in_any_batch() -> None:
    alone = Sequences([37], [3], "cpu")
    mixed = Sequences([37, 40, 37, 5], [3, 3, 3, 5], "cpu")
    mixed.q[:3], mixed.kv[0] = alone.q, alone.kv[0]
    for i in range(37):
        page = mixed.inputs.page_tables[0][i // PAGE_TOKENS]
        mixed.pool[page, :, i % PAGE_TOKENS] = alone.kv[0][:, i]
    assert torch.equal(mixed.run(None)[:3], alone.run(None))


def test_a_bounded_gather_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, rows = [20] * 7 + [48], [1] * 7 + [2]
    unbounded = Sequences(lens, rows, "cpu").run(None)
    monkeypatch.setattr(torch_attention, "MAX_GATHERED_TOKENS", 64)
    sequences = Sequences(lens, rows, "cpu")
    assert torch.equal(sequences.run(None), unbounded)


def test_a_window_leaves_pages_before_it_unread() -> None:
    sequences = Sequences([60], [2], "cpu")
    sequences.pool[list(sequences.inputs.page_tables[0][:2])] = torch.nan
    assert torch.isfinite(sequences.run(20)).all()
    assert not torch.isfinite(sequences.run(None)).all()


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else() -> None:
    sequences = Sequences([18, 5], [3, 1], "cpu")
    before = sequences.pool.clone()
    sequences.run(None)
    changed = {tuple(at) for at in (~torch.isnan(sequences.pool) & torch.isnan(before)).any(-1).any(-1).any(1).nonzero().tolist()}
    assert changed == {divmod(int(slot), PAGE_TOKENS) for slot in sequences.inputs.slots}
    slots = sequences.inputs.slots
    written = sequences.pool[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS]
    expected = torch.cat([kv[:, kv.shape[1] - n :] for kv, n in zip(sequences.kv, [3, 1], strict=True)], dim=1)
    assert torch.equal(written.transpose(0, 1), expected)
