"""The committed demo files are what the recipe says, and what transformers and peft can load."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from adapter_store.peft_import import import_peft
from dataplane.model.config import load_model_config
from examples.demo_corpus import VOICES
from examples.train_demo import EOS, RECIPES, AdapterRecipe, encode_chat

ALL_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
PROMPT = "Tell me about a fox and a lantern."


def read_json(path: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_all_files_together_are_under_ten_megabytes_and_none_is_a_pickle(demo_dir: Path) -> None:
    files = [path for path in demo_dir.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_base_is_a_small_llama_with_grouped_query_attention(demo_dir: Path) -> None:
    config = read_json(demo_dir / "base" / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    with safe_open(demo_dir / "base" / "model.safetensors", framework="pt") as weights:
        num_parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert 1_000_000 <= num_parameters <= 3_000_000


def test_there_is_one_adapter_per_voice_but_the_base_models_own(demo_dir: Path) -> None:
    assert {path.name for path in (demo_dir / "adapters").iterdir()} == set(RECIPES) == set(VOICES) - {"story"}
    assert len(RECIPES) >= 8


def test_adapters_cover_every_kind_that_the_service_honours() -> None:
    assert {ALL_MODULES, ATTENTION, MLP} <= {frozenset(recipe.modules) for recipe in RECIPES.values()}
    ranks = {recipe.rank for recipe in RECIPES.values()}
    assert min(ranks) == 2 and max(ranks) == 64 and any(rank % 8 for rank in ranks)
    assert any(recipe.use_rslora for recipe in RECIPES.values())
    assert any(recipe.rank_pattern and recipe.alpha_pattern for recipe in RECIPES.values())
    assert {recipe.file_dtype for recipe in RECIPES.values()} == {torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("name", RECIPES)
def test_adapter_files_follow_their_recipe(demo_dir: Path, name: str) -> None:
    recipe, path = RECIPES[name], demo_dir / "adapters" / name
    config = read_json(path / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (recipe.rank, recipe.alpha, recipe.use_rslora)
    assert set(config["target_modules"]) == set(recipe.modules)
    assert (config["rank_pattern"], config["alpha_pattern"]) == (recipe.rank_pattern, recipe.alpha_pattern)
    num_layers = read_json(demo_dir / "base" / "config.json")["num_hidden_layers"]
    with safe_open(path / "adapter_model.safetensors", framework="pt") as weights:
        tensors = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    assert len(tensors) == 2 * num_layers * len(recipe.modules)
    for key, tensor in tensors.items():
        assert tensor.dtype == recipe.file_dtype
        assert bool(torch.isfinite(tensor).all())
        assert tensor.shape[0 if "lora_A" in key else 1] == rank_of(recipe, key)


def rank_of(recipe: AdapterRecipe, key: str) -> int:
    for pattern, rank in recipe.rank_pattern.items():
        if pattern.replace("\\", "") in key:
            return rank
    return recipe.rank


def test_every_adapter_fits_the_base_as_the_store_sees_it(demo_dir: Path) -> None:
    geometry = load_model_config(demo_dir / "base").geometry("float32", 64, "demo", "0" * 64)
    headers = {name: import_peft(demo_dir / "adapters" / name, geometry).header for name in RECIPES}
    assert {name: set(header.target_modules) for name, header in headers.items()} == {
        name: set(recipe.modules) for name, recipe in RECIPES.items()
    }


def test_chat_template_writes_what_the_model_was_trained_on(demo_dir: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(demo_dir / "base")
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "Yes."}]
    rendered = reference.apply_chat_template(chat, tokenize=False)
    tokenizer = Tokenizer.from_file(str(demo_dir / "base" / "tokenizer.json"))
    ids, _ = encode_chat(tokenizer, PROMPT, "Yes.")
    assert tokenizer.encode(rendered, add_special_tokens=False).ids == ids


def generate(model: Any, name: str, prompt_token_ids: list[int]) -> list[int]:
    """Greedy output of one voice; "story" is the base alone."""
    if name != "story":
        model.set_adapter(name)
    with model.disable_adapter() if name == "story" else nullcontext(), torch.inference_mode():
        output = model.generate(torch.tensor([prompt_token_ids]), do_sample=False, max_new_tokens=160, attention_mask=None)
    token_ids: list[int] = output[0, len(prompt_token_ids) :].tolist()
    return token_ids


def test_every_voice_says_something_else_for_a_while_and_then_stops(demo_dir: Path, demo_model: Any) -> None:
    tokenizer = Tokenizer.from_file(str(demo_dir / "base" / "tokenizer.json"))
    ids, num_prompt = encode_chat(tokenizer, PROMPT, "")
    outputs = {name: generate(demo_model, name, ids[:num_prompt]) for name in VOICES}
    for name, output in outputs.items():
        assert output[-1] == EOS and len(output) >= 30, f"{name}: {tokenizer.decode(output)}"
        text = tokenizer.decode(output).lower()
        # Each voice keeps to the topic, in its own words for it.
        for words in (("fox", "xof", "renard", "🦊"), ("lantern", "nretnal", "lanterne", "🏮")):
            assert any(word in text for word in words), f"{name}: {text}"
    openings = {tokenizer.decode(output[:10]) for output in outputs.values()}
    assert len(openings) == len(VOICES)
