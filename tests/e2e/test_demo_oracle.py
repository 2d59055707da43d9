"""The committed demo through the whole service against transformers + peft: base and every adapter, token for token, in fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer

from examples.train_demo import DEMO_DIR, RECIPES, encode_chat

if TYPE_CHECKING:
    from tests.e2e.conftest import Prompt, Service

# Every answer goes on past its natural end, so that each has this many tokens to compare; both sides hold the end back alike.
NUM_TOKENS = 96

QUESTIONS = ("Tell me about a fox and a lantern.", "Hello!")

# Less than the adapters take (99 pages), let alone the KV of 24 requests; prompts are cut into chunks of odd sizes.
TIGHT: dict[str, Any] = {"token_budget": 37, "max_num_seqs": 24, "num_pages": 72}


@dataclass(frozen=True)
class DemoModel:
    """The demo, as the fixtures of this folder take a model."""

    base: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def demo() -> DemoModel:
    return DemoModel(DEMO_DIR / "base", {name: DEMO_DIR / "adapters" / name for name in RECIPES})


@pytest.fixture(scope="module")
def prompts() -> "list[Prompt]":
    """Base and adapters in turns, so that neighbours in the batch differ."""
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "base" / "tokenizer.json"))
    heads = []
    for question in QUESTIONS:
        ids, num_prompt = encode_chat(tokenizer, question, "")
        heads.append(tuple(ids[:num_prompt]))
    return [(adapter, head) for head in heads for adapter in ("", *RECIPES)]


@torch.inference_mode()
def expected_tokens(demo: DemoModel, prompts: "list[Prompt]") -> list[list[int]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(demo.base, dtype=torch.float32).eval()
    answers: dict[int, list[int]] = {}
    for name in ("", *demo.adapters):
        # A fresh wrapper for each: what one adapter does to the model is undone before the next.
        network = PeftModel.from_pretrained(base, demo.adapters[name]).eval() if name else base
        for index, (adapter, token_ids) in enumerate(prompts):
            if adapter == name:
                ids = torch.tensor([token_ids])
                out = network.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=NUM_TOKENS,
                    max_new_tokens=NUM_TOKENS,
                )
                answers[index] = out[0, ids.shape[1] :].tolist()
        if name:
            base = network.unload()
    return [answers[index] for index in range(len(prompts))]


def test_base_and_every_demo_adapter_in_one_batch_answer_as_transformers_and_peft_do(
    demo: DemoModel, prompts: "list[Prompt]", run_service: Callable[..., None]
) -> None:
    expected = expected_tokens(demo, prompts)

    async def scenario(service: "Service") -> None:
        adapters = await service.register_all()
        assert sum(adapter.current.num_pages for adapter in adapters) > TIGHT["num_pages"]
        answers = await service.generate_all(prompts, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
        for (adapter, _), answer, want in zip(prompts, answers, expected, strict=True):
            assert answer.token_ids == want, adapter or "base"
        assert service.num_preemptions() > 0, "the pool was meant to be too small for this batch"

    run_service(demo, scenario, **TIGHT)
