"""The whole service against transformers + peft: greedy output over gRPC, token for token, in fp32."""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Prompt, Service, TinyModel

MAX_TOKENS = 64

RANKS = (2, 8, 12, 16)

# Every step is short of something: prompts are cut into chunks of odd sizes, requests are preempted, and the pool does not even
# hold the four adapters (38 pages) at once.
TIGHT: dict[str, Any] = {"token_budget": 29, "max_num_seqs": 12, "num_pages": 36}


def _prompts(model: "TinyModel", per_adapter: int, seed: int) -> "list[Prompt]":
    """Base rows and every adapter, shuffled, with prompts of very different lengths."""
    rng = random.Random(seed)
    prompts: list[Prompt] = []
    for adapter in ("", *model.adapters):
        for _ in range(per_adapter):
            prompts.append((adapter, tuple(rng.randrange(3, 199) for _ in range(rng.choice([1, 2, 15, 16, 17, 33, 70])))))
    rng.shuffle(prompts)
    return prompts


@pytest.mark.parametrize("architecture", ["llama", "llama31", "mistral", "qwen2", "qwen3"])
def test_every_row_of_a_mixed_batch_answers_as_transformers_and_peft_do(
    architecture: str,
    build_model: "Callable[..., TinyModel]",
    reference_greedy: "Callable[[TinyModel, Sequence[Prompt], int], list[tuple[int, ...]]]",
    run_service: Callable[..., None],
) -> None:
    model = build_model(architecture, RANKS)
    prompts = _prompts(model, per_adapter=3, seed=7)
    expected = reference_greedy(model, prompts, MAX_TOKENS)

    async def scenario(service: "Service") -> None:
        adapters = await service.register_all()
        assert sum(adapter.current.num_pages for adapter in adapters) > TIGHT["num_pages"]
        answers = await service.generate_all(prompts, max_tokens=MAX_TOKENS)
        for (adapter, token_ids), answer, want in zip(prompts, answers, expected, strict=True):
            assert tuple(answer.token_ids) == want, f"{adapter or 'base'} after {len(token_ids)} prompt tokens"
        assert service.num_preemptions() > 0, "the pool was meant to be too small for this batch"

    run_service(model, scenario, **TIGHT)
