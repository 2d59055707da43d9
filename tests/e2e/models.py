"""Random base models of every architecture on disk, with random PEFT adapters. Knows nothing of the service."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB_SIZE = 199

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that a random model has clear preferences, so that rounding never decides a token.
    "initializer_range": 0.2,
}

ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama31": lambda: LlamaConfig(
        **_SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**_SHAPE, head_dim=16, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**{**_SHAPE, "num_key_value_heads": 1}, head_dim=32),
    # Heads as FlashInfer takes them.
    "llama-64": lambda: LlamaConfig(**_SHAPE, head_dim=64),
    "mistral-64": lambda: MistralConfig(**_SHAPE, head_dim=64, sliding_window=24),
    "qwen3-64": lambda: Qwen3Config(**{**_SHAPE, "num_key_value_heads": 1}, head_dim=64),
}


@dataclass(frozen=True)
class TinyModel:
    """A random base model on disk with its adapters: name to PEFT directory."""

    base: Path
    adapters: dict[str, Path]


# (adapter, prompt token ids); an empty adapter is the base model.
Prompt = tuple[str, tuple[int, ...]]


@pytest.fixture(scope="session")
def build_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """build(architecture, ranks) saves a random base of that architecture with one random adapter per rank over all modules."""
    cache: dict[tuple[str, tuple[int, ...]], TinyModel] = {}

    def build(architecture: str, ranks: Sequence[int] = (2, 8, 16)) -> TinyModel:
        key = (architecture, tuple(ranks))
        if key not in cache:
            root = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(len(cache))
            base = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
            _randomize_biases(base)
            base.save_pretrained(root / "base")
            _save_tokenizer(root / "base")
            adapters = {}
            for number, rank in enumerate(ranks):
                name = f"random-{number}-r{rank}"
                _save_random_adapter(root / "base", root / name, seed=100 + number, r=rank)
                adapters[name] = root / name
            cache[key] = TinyModel(root / "base", adapters)
        return cache[key]

    return build


@pytest.fixture(scope="session")
def save_adapter() -> Callable[..., Path]:
    """save(model, directory, seed, **LoraConfig options) has peft write a random adapter of that base; returns the directory."""

    def save(model: TinyModel, directory: Path, seed: int, **options: Any) -> Path:
        _save_random_adapter(model.base, directory, seed, **options)
        return directory

    return save


def _randomize_biases(model: PreTrainedModel) -> None:
    """Biases and norm weights start as zeros and ones, which would hide a missing or swapped one."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


def _save_random_adapter(base: Path, target: Path, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    rank = options.setdefault("r", 8)
    options.setdefault("lora_alpha", 2 * rank)
    options.setdefault("target_modules", ALL_MODULES)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(network, LoraConfig(init_lora_weights=False, **options))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3 / rank**0.5 if "lora_A" in name else 0.3)
    peft.save_pretrained(target)


def _save_tokenizer(base: Path) -> None:
    """Byte-level, one token per byte for the first bytes of the alphabet: text is not the point of a random model."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet[:VOCAB_SIZE])}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(base / "tokenizer.json"))
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
