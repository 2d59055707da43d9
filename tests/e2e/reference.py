"""What transformers + peft compute and answer, in fp32 on the CPU: the reference for the service, of which it knows nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.e2e.models import Prompt, TinyModel


@pytest.fixture(scope="session")
def reference_model() -> Callable[[TinyModel], PreTrainedModel | PeftModel]:
    """The base in transformers, in fp32 on the CPU, with every adapter of the model loaded by peft."""
    loaded: dict[tuple[Path, ...], PreTrainedModel | PeftModel] = {}

    def model_of(model: TinyModel) -> PreTrainedModel | PeftModel:
        key = (model.base, *model.adapters.values())
        if key not in loaded:
            network = AutoModelForCausalLM.from_pretrained(model.base, dtype=torch.float32).eval()
            for number, (name, path) in enumerate(model.adapters.items()):
                if number == 0:
                    network = PeftModel.from_pretrained(network, path, adapter_name=name)
                else:
                    network.load_adapter(str(path), adapter_name=name)
            loaded[key] = network
        return loaded[key]

    return model_of


@pytest.fixture(scope="session")
def reference_logits(
    reference_model: Callable[[TinyModel], PreTrainedModel | PeftModel],
) -> Callable[[TinyModel, str, Sequence[int]], torch.Tensor]:
    """logits(model, adapter, token_ids) -> [num_tokens, vocab]: what transformers + peft compute."""

    @torch.inference_mode()
    def logits(model: TinyModel, adapter: str, token_ids: Sequence[int]) -> torch.Tensor:
        network = reference_model(model)
        with _speaking_as(network, adapter):
            computed: torch.Tensor = network(input_ids=torch.tensor([list(token_ids)])).logits[0]
        return computed

    return logits


@pytest.fixture(scope="session")
def reference_greedy(
    reference_model: Callable[[TinyModel], PreTrainedModel | PeftModel],
) -> Callable[[TinyModel, Sequence[Prompt], int], list[tuple[int, ...]]]:
    """What transformers + peft answer, greedily, one prompt at a time, in fp32 on the CPU."""

    @torch.inference_mode()
    def generate(model: TinyModel, prompts: Sequence[Prompt], max_tokens: int) -> list[tuple[int, ...]]:
        network = reference_model(model)
        answers = []
        for adapter, token_ids in prompts:
            ids = torch.tensor([token_ids])
            options = {
                "do_sample": False,
                "max_new_tokens": max_tokens,
                "attention_mask": torch.ones_like(ids),
                "pad_token_id": 0,
            }
            with _speaking_as(network, adapter):
                out = network.generate(input_ids=ids, **options)
            answers.append(tuple(out[0, ids.shape[1] :].tolist()))
        return answers

    return generate


@contextmanager
def _speaking_as(network: PreTrainedModel | PeftModel, adapter: str) -> Iterator[None]:
    """Within it the network speaks as that adapter; empty is the base."""
    if adapter:
        network.set_adapter(adapter)
        yield
    elif isinstance(network, PeftModel):
        with network.disable_adapter():
            yield
    else:
        yield
