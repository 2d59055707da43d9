"""A tokenizer for the control plane, and the way to run a scenario against a fresh one."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.null_engine import NullConfig
from tests.controlplane.app.served import ALPHABET, NULL, TIMEOUT_S, Client, running

Scenario = Callable[[Client], Coroutine[Any, Any, None]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token per byte, an end of sequence and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    return directory


@pytest.fixture
def play(tmp_path: Path, model_dir: Path) -> Callable[..., None]:
    """Runs a scenario against a fresh control plane."""

    def run(scenario: Scenario, null: NullConfig = NULL, **options: Any) -> None:
        async def inside() -> None:
            # A failed test keeps its closed event loop alive, and grpc.aio may trip over it in the next one and wait for ever.
            async with asyncio.timeout(4 * TIMEOUT_S), running(tmp_path, model_dir, null, **options) as client:
                await scenario(client)

        asyncio.run(inside())

    return run
