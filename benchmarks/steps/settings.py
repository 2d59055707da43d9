"""What is measured: shapes, batches, adapters and lengths. Computes nothing."""

from dataclasses import dataclass

from benchmarks.model_shapes import LLAMA_3_8B, LLAMA_7B, TINY, ModelShape


@dataclass(frozen=True, slots=True)
class StepSettings:
    """Sizes of one run. A rank may not have more adapters than requests.

    shape: with adapters on q, k, v and o. wide_shape: with adapters on every linear module.
    context: tokens that a decoding request has in KV, in the middle of the measurement.
    small_rank, large_rank: of adapters all alike; the large one's are max_large at most, as are those of mixed ranks.
    num_places: rooms for adapters that are loaded while steps run.
    num_decodes, prompts: of steps in which prompts join decoding requests. prefill: the prompt of a step of its own.
    """

    shape: ModelShape
    wide_shape: ModelShape
    context: int
    batches: tuple[int, ...]
    small_rank: int
    large_rank: int
    mixed_ranks: tuple[int, ...]
    max_large: int
    num_shared: int
    num_places: int
    num_decodes: int
    prompts: tuple[int, ...]
    prefill: int
    max_num_seqs: int
    token_budget: int
    num_warmup: int
    num_steps: int

    def num_tokens(self, num_requests: int) -> int:
        """KV of so many requests at their end, and of two prompts, one of which has just left."""
        longest = self.context + self.num_warmup + self.num_steps
        return num_requests * longest + 2 * max(self.prefill, *self.prompts)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of all adapters that the batches need."""
        num_each = self.max_large // len(self.mixed_ranks)
        counts = {rank: num_each for rank in self.mixed_ranks}
        counts[self.small_rank] = max(self.batches)
        counts[self.large_rank] = self.max_large
        return tuple(rank for rank, count in counts.items() for _ in range(count))

    @property
    def wide_ranks(self) -> tuple[int, ...]:
        """Of the adapters on every linear module."""
        return self.mixed_ranks * (self.max_large // len(self.mixed_ranks))


SETTINGS = {
    "llama-7b": StepSettings(
        shape=LLAMA_7B,
        wide_shape=LLAMA_3_8B,
        context=512,
        batches=(1, 8, 32, 64, 128, 256),
        small_rank=16,
        large_rank=64,
        mixed_ranks=(8, 16, 32, 64),
        max_large=64,
        num_shared=8,
        num_places=8,
        num_decodes=200,
        prompts=(64, 256, 512),
        prefill=2048,
        max_num_seqs=256,
        token_budget=2048,
        num_warmup=8,
        num_steps=40,
    ),
    "tiny": StepSettings(
        shape=TINY,
        wide_shape=TINY,
        context=40,
        batches=(1, 4, 8),
        small_rank=2,
        large_rank=4,
        mixed_ranks=(1, 2, 3, 4),
        max_large=4,
        num_shared=2,
        num_places=1,
        num_decodes=6,
        prompts=(8, 16),
        prefill=64,
        max_num_seqs=8,
        token_budget=64,
        num_warmup=1,
        num_steps=4,
    ),
}
