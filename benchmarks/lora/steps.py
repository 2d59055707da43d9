"""The LoRA operations that are measured: tokens, adapters and ranks of a step, and the memory that it works on. Times nothing."""

from dataclasses import dataclass

import torch

from benchmarks.model_shapes import LLAMA_3_8B, LLAMA_7B, ModelShape, geometry_of
from kernels.lora import LoraAdapter, LoraLaunches, LoraRows, LoraTarget

Group = tuple[LoraTarget, ...]

NUM_LAYERS = 32
DTYPE = torch.bfloat16


def _groups(shape: ModelShape, *inputs: tuple[str, ...]) -> tuple[Group, ...]:
    """The targets of each input, side by side in y."""
    geometry, groups = geometry_of(shape), []
    for names in inputs:
        targets, start = [], 0
        for name in names:
            module = geometry.module(name)
            assert module is not None, name
            targets.append(LoraTarget(name, module.in_features, module.out_features, start))
            start += module.out_features
        groups.append(tuple(targets))
    return tuple(groups)


_QKV, _O, _GATE_UP, _DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
ATTENTION_7B = _groups(LLAMA_7B, _QKV, _O)
ALL_8B = _groups(LLAMA_3_8B, _QKV, _O, _GATE_UP, _DOWN)


@dataclass(frozen=True)
class LoraStep:
    """One row of the table. target_ms: what the kernels are held against.

    Tokens are dealt to adapters in turn, or in runs for prefill.
    """

    name: str
    groups: tuple[Group, ...]
    num_tokens: int
    ranks: tuple[int, ...]
    target_ms: float | None
    is_prefill: bool = False

    @property
    def adapter_index(self) -> list[int]:
        """Which adapter each token has."""
        per_adapter = self.num_tokens // len(self.ranks)
        return [t // per_adapter if self.is_prefill else t % len(self.ranks) for t in range(self.num_tokens)]

    @property
    def launches(self) -> LoraLaunches:
        """What may be captured for such a step."""
        return LoraLaunches.AS_NEEDED if self.is_prefill else LoraLaunches.DECODE

    @property
    def num_bytes(self) -> int:
        """Each used weight read once, x read, y read and written."""
        targets = [target for g in self.groups for target in g]
        weights = sum(rank * (t.in_features + t.out_features) for rank in self.ranks for t in targets)
        activations = sum(g[0].in_features + 2 * sum(t.out_features for t in g) for g in self.groups)
        return 2 * NUM_LAYERS * (weights + self.num_tokens * activations)


STEPS = (
    LoraStep("1 token, 1 adapter, rank 16", ATTENTION_7B, 1, (16,), 0.3),
    LoraStep("32 tokens of 32 adapters, rank 16", ATTENTION_7B, 32, (16,) * 32, 0.5),
    LoraStep("64 of 64, rank 16", ATTENTION_7B, 64, (16,) * 64, 0.8),
    LoraStep("64 tokens of 8 adapters, rank 8", ATTENTION_7B, 64, (8,) * 8, 0.35),
    LoraStep("64 of 64, rank 64", ATTENTION_7B, 64, (64,) * 64, 2.7),
    LoraStep("64 of 64, ranks 8, 16, 32, 64", ATTENTION_7B, 64, (8, 16, 32, 64) * 16, None),
    LoraStep("256 tokens of 32 adapters, rank 16", ATTENTION_7B, 256, (16,) * 32, None),
    LoraStep("Llama-3-8B shape, all seven modules, 64 of 64, rank 16", ALL_8B, 64, (16,) * 64, 1.9),
    LoraStep("Llama-3-8B shape, all seven modules, 64 of 64, ranks 8, 16, 32, 64", ALL_8B, 64, (8, 16, 32, 64) * 16, None),
    LoraStep("prefill, 4096 tokens of 8 adapters, rank 16", ATTENTION_7B, 4096, (16,) * 8, 4.5, is_prefill=True),
    LoraStep("prefill, 4096 tokens of 8 adapters, rank 64", ATTENTION_7B, 4096, (64,) * 8, None, is_prefill=True),
)


class Weights:
    """All layers of a pool full of adapters, each row beside the next in shuffled order, and activations."""

    def __init__(self, step: LoraStep) -> None:
        targets = [target for g in step.groups for target in g]
        layer_elems = sum(rank * (t.in_features + t.out_features) for rank in step.ranks for t in targets)
        self.pool = torch.empty(NUM_LAYERS, layer_elems, dtype=DTYPE, device="cuda")
        for layer in self.pool:
            layer.normal_(std=0.05)
        self._end = 0
        self.adapters = [LoraAdapter({t.module: self._place(t, rank) for t in targets}) for rank in step.ranks]
        self.x = [torch.randn(step.num_tokens, g[0].in_features, device="cuda").to(DTYPE) for g in step.groups]
        self.y = [torch.randn(step.num_tokens, sum(t.out_features for t in g), device="cuda").to(DTYPE) for g in step.groups]

    def _place(self, target: LoraTarget, rank: int) -> LoraRows:
        starts = []
        for length in (target.in_features, target.out_features):
            rows = self._end + length * torch.randperm(rank)
            starts.append(rows.to("cuda"))
            self._end += length * rank
        return LoraRows(rank, 0.5, starts[0], starts[1])

    def matrices(self, layer: int, target: LoraTarget, max_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A transposed [adapters, in, max_rank] and B transposed [adapters, max_rank, out], padded with zeros."""
        a = torch.zeros(len(self.adapters), max_rank, target.in_features, dtype=DTYPE, device="cuda")
        b = torch.zeros(len(self.adapters), max_rank, target.out_features, dtype=DTYPE, device="cuda")
        for i, adapter in enumerate(self.adapters):
            rows = adapter.modules[target.module]
            a[i, : rows.rank] = self.pool[layer].unfold(0, target.in_features, 1)[rows.a_rows]
            b[i, : rows.rank] = self.pool[layer].unfold(0, target.out_features, 1)[rows.b_rows]
        return a.transpose(1, 2).contiguous(), b
