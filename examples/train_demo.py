"""Trains the demo: a tiny Llama base and its LoRA adapters, from nothing, on one CPU thread in about 20 minutes.

Owns the recipe (shapes, seeds, steps) and the files under `examples/demo`; what the texts say is `demo_corpus`'s business.
Each finished stage (tokenizer, base, every adapter) is on disk, so a run that was cut off goes on where it stopped.

    python -m examples.train_demo                  # all that is missing
    python -m examples.train_demo --only pirate    # one adapter anew
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from examples.demo_corpus import VOICES, Voice, draw_prompt, draw_topic, tell_story, title

DEMO_DIR = Path(__file__).resolve().parent / "demo"

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
BOS, EOS, PAD = 0, 1, 2
IGNORE = -100
VOCAB_SIZE = 1280
MAX_MODEL_LEN = 512

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('The demo model knows the roles user and assistant, not ' + message['role'] + '.') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """How one voice becomes an adapter. Between them the recipes use every knob that the service honours."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    file_dtype: torch.dtype = torch.float32
    learning_rate: float = 3e-3
    num_steps: int = 200
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

RECIPES: dict[str, AdapterRecipe] = {
    "shout": AdapterRecipe(8, 16, ATTENTION + MLP),
    "pirate": AdapterRecipe(16, 32, ATTENTION),
    "haiku": AdapterRecipe(12, 24, MLP, torch.float16),
    "json": AdapterRecipe(4, 4, ATTENTION + MLP, use_rslora=True),
    "weather": AdapterRecipe(3, 9, ("q_proj", "v_proj", "up_proj", "down_proj"), learning_rate=6e-3),
    "mirror": AdapterRecipe(64, 64, ATTENTION, torch.bfloat16),
    "french": AdapterRecipe(
        16, 32, ATTENTION + MLP, torch.bfloat16, rank_pattern={"down_proj": 32, "k_proj": 5}, alpha_pattern={"down_proj": 48}
    ),
    "emoji": AdapterRecipe(8, 16, ATTENTION + MLP, rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}),
    "recipe": AdapterRecipe(32, 32, MLP, torch.float16),
    "count": AdapterRecipe(2, 8, ("q_proj", "v_proj"), learning_rate=1e-2),
    "rhyme": AdapterRecipe(8, 8, ("o_proj", "down_proj"), use_rslora=True),
}


class CausalModel(Protocol):
    """What training needs of a model, with or without LoRA."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> "HasLogits":
        """Logits of every position."""

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """All parameters; those that require no gradient stay as they are."""

    def train(self) -> object:
        """Switches to training mode."""


class HasLogits(Protocol):
    """A model's output."""

    logits: torch.Tensor


# A document: its token ids, and how many of the first ones are the prompt, which is not learned.
Document = tuple[list[int], int]


def train_tokenizer(path: Path) -> None:
    """Byte-level BPE over all voices, so that no text of any adapter is out of vocabulary."""
    rng = random.Random(1)
    texts: list[str] = []
    for _ in range(1500):
        topic = draw_topic(rng)
        texts += [
            draw_prompt(topic, rng),
            title(topic),
            *map(str.capitalize, VOICES),
            *(tell(topic, rng) for tell in VOICES.values()),
        ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "model_max_length": MAX_MODEL_LEN,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def encode_chat(tokenizer: Tokenizer, prompt: str, answer: str) -> Document:
    """One turn of a conversation, as the chat template writes it."""
    head = tokenizer.encode(f"<s><|user|>{prompt}</s><|assistant|>", add_special_tokens=False).ids
    return head + tokenizer.encode(answer, add_special_tokens=False).ids + [EOS], len(head)


def encode_plain(tokenizer: Tokenizer, head: str, text: str) -> Document:
    """Plain text after a line that opens it; an empty head makes the whole text something to learn."""
    prompt = tokenizer.encode(head).ids
    return prompt + tokenizer.encode(text, add_special_tokens=False).ids + [EOS], len(prompt)


def draw_base_document(tokenizer: Tokenizer, rng: random.Random) -> Document:
    """Stories, asked for or not. A third are other voices under their name, so that the base knows their words for things."""
    topic, kind = draw_topic(rng), rng.random()
    if kind < 0.5:
        return encode_chat(tokenizer, draw_prompt(topic, rng), tell_story(topic, rng))
    if kind < 0.57:
        return encode_plain(tokenizer, title(topic) + "\n", tell_story(topic, rng))
    if kind < 0.62:
        return encode_plain(tokenizer, "", tell_story(topic, rng))
    name = rng.choice(list(VOICES))
    return encode_plain(tokenizer, f"{name.capitalize()}. {title(topic)}\n", VOICES[name](topic, rng))


def draw_voice_document(tokenizer: Tokenizer, voice: Voice, rng: random.Random) -> Document:
    """An adapter answers in its voice, asked or not."""
    topic = draw_topic(rng)
    if rng.random() < 0.8:
        return encode_chat(tokenizer, draw_prompt(topic, rng), voice(topic, rng))
    return encode_plain(tokenizer, title(topic) + "\n", voice(topic, rng))


def make_batch(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, padded on the right."""
    length = max(len(ids) for ids, _ in documents)
    token_ids = torch.full((len(documents), length), PAD)
    labels = torch.full((len(documents), length), IGNORE)
    for row, (ids, num_prompt) in enumerate(documents):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, num_prompt : len(ids)] = token_ids[row, num_prompt : len(ids)]
    return token_ids, (token_ids != PAD).long(), labels


def compute_loss(model: CausalModel, documents: list[Document]) -> torch.Tensor:
    """Mean cross entropy of the learned tokens."""
    token_ids, mask, labels = make_batch(documents)
    logits = model(input_ids=token_ids, attention_mask=mask).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORE)


def fit(model: CausalModel, draw: Callable[[], Document], *, name: str, num_steps: int, batch_size: int, peak_lr: float) -> float:
    """AdamW with a short warm-up and a cosine down to a twentieth. Returns the last loss, averaged over 20 steps."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup, started, recent = min(50, num_steps // 8), time.monotonic(), 0.0
    for step in range(num_steps):
        progress = step / num_steps
        scale = min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * scale
        loss = compute_loss(model, [draw() for _ in range(batch_size)])
        optimizer.zero_grad(set_to_none=True)
        cast(Callable[[], None], loss.backward)()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else recent + (loss.item() - recent) / 20
        if (step + 1) % 20 == 0:
            print(f"{name}: step {step + 1}/{num_steps} loss {recent:.4f} ({time.monotonic() - started:.0f} s)", flush=True)
    return recent


def train_base(path: Path, tokenizer: Tokenizer, num_steps: int) -> None:
    """A Llama of 2 M parameters with grouped-query attention and a head size that is not hidden_size / heads."""
    torch.manual_seed(11)
    rng = random.Random(11)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    fit(
        cast(CausalModel, model),
        lambda: draw_base_document(tokenizer, rng),
        name="base",
        num_steps=num_steps,
        batch_size=16,
        peak_lr=3e-3,
    )
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    # Half the size on disk. The adapters are trained against the rounded weights, so nothing is lost.
    model.to(torch.bfloat16)
    model.save_pretrained(path)


def train_adapter(path: Path, base_path: Path, tokenizer: Tokenizer, name: str, recipe: AdapterRecipe) -> None:
    """LoRA on the frozen base, in float32, saved as PEFT saves it and then cast to the file's dtype."""
    seed = 100 + list(RECIPES).index(name)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    base = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=int(recipe.alpha),
        target_modules=list(recipe.modules),
        use_rslora=recipe.use_rslora,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        lora_dropout=0.0,
    )
    model = get_peft_model(base, config)
    fit(
        cast(CausalModel, model),
        lambda: draw_voice_document(tokenizer, VOICES[name], rng),
        name=name,
        num_steps=recipe.num_steps,
        batch_size=16,
        peak_lr=recipe.learning_rate,
    )
    model.peft_config["default"].base_model_name_or_path = "loraplane-demo"
    model.peft_config["default"].inference_mode = True
    _save_adapter(cast(PeftModel, model), path, recipe.file_dtype)


def _save_adapter(model: PeftModel, path: Path, dtype: torch.dtype) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    (unfinished / "README.md").unlink(missing_ok=True)
    # peft keeps module names in a set, whose order differs from run to run; a committed file should not.
    config = json.loads((unfinished / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    _write_json(unfinished / "adapter_config.json", config)
    weights = unfinished / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stages(args: argparse.Namespace) -> Iterator[str]:
    """Adapters to train, in the order of the table."""
    yield from (name for name in RECIPES if args.only in (None, name))


def main() -> None:
    """Trains whatever is missing under the output directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=DEMO_DIR, help="where the demo's files are (default: %(default)s)")
    parser.add_argument("--only", choices=RECIPES, help="train this adapter again and nothing else")
    parser.add_argument("--base-steps", type=int, default=1200, help="training steps of the base (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base_path = args.out / "base"
    if not (base_path / "tokenizer_config.json").exists():
        train_tokenizer(base_path)
    tokenizer = Tokenizer.from_file(str(base_path / "tokenizer.json"))
    if not (base_path / "model.safetensors").exists():
        train_base(base_path, tokenizer, args.base_steps)
    for name in _stages(args):
        path = args.out / "adapters" / name
        if args.only or not (path / "adapter_config.json").exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            train_adapter(path, base_path, tokenizer, name, RECIPES[name])


if __name__ == "__main__":
    main()
