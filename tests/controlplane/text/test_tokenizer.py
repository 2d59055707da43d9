"""Prompts and conversations become the ids that transformers makes of them, from the same model directory."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from controlplane.text.chat_template import ChatTemplate, ChatTemplateError
from controlplane.text.tokenizer import Tokenizer, TokenizerError

TEXTS = [
    "hello world",
    "hello  </s>  hello",
    " leading and trailing ",
    "<s>special</s> inside<|user|>",
    "größe 日本 🙂",
    "a" * 500,
    "\n\n\ttabs",
]

CHAT_TEMPLATE = """{%- if messages[0].role == 'system' -%}
    {{- bos_token + '[' + messages[0].content + ']' }}
    {%- set messages = messages[1:] %}
{%- else %}{{ bos_token }}{% endif -%}
{% for message in messages %}
    {% if message.role not in ('user', 'assistant') %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}
    {% if loop.index > 3 %}{% break %}{% endif %}
<|{{ message.role }}|>{{ message.content | trim }}{{ {'r': message.role} | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% generation %}{% endgeneration %}{% endif %}"""

CHATS = [
    [{"role": "user", "content": " hi & <b>bye</b> "}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é?"}, {"role": "assistant", "content": "yes"}],
    [{"role": "user", "content": str(number)} for number in range(6)],
]


def save_tokenizer(model_dir: Path, config: dict[str, Any], *, with_post_processor: bool) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello there"] * 3, trainer)
    if with_post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(7)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    eos_token = {"__type": "AddedToken", "content": "</s>", "normalized": False, "special": True}
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos_token}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(base | config))


def reference(model_dir: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(model_dir)


@pytest.mark.parametrize("with_post_processor", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"pad_token": "<pad>"},
        {"additional_special_tokens": ["<pad>", {"__type": "AddedToken", "content": "hello", "special": True, "rstrip": True}]},
        {"added_tokens_decoder": {"330": {"content": "<|new|>", "special": True, "normalized": False}}},
    ],
)
def test_texts_become_the_ids_of_transformers(tmp_path: Path, config: dict[str, Any], with_post_processor: bool) -> None:
    save_tokenizer(tmp_path, config, with_post_processor=with_post_processor)
    expected = reference(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for text in [*TEXTS, "<|new|>x<pad>"]:
        assert list(tokenizer.encode(text, add_special_tokens=True)) == expected(text, truncation=False)["input_ids"]


@pytest.mark.parametrize("place", ["config", "named", "file"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations_become_the_ids_of_transformers(tmp_path: Path, place: str, add_generation_prompt: bool) -> None:
    config: dict[str, Any] = {}
    if place == "config":
        config["chat_template"] = CHAT_TEMPLATE
    elif place == "named":
        config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
    save_tokenizer(tmp_path, config, with_post_processor=True)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    expected = reference(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for chat in CHATS:
        text = expected.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert tokenizer.render_chat(chat, add_generation_prompt) == text
        ids = expected.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert list(asyncio.run(tokenizer.encode_chat(chat, add_generation_prompt))) == ids


def test_long_prompts_are_tokenized_alike_in_a_thread(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, {"chat_template": CHAT_TEMPLATE}, with_post_processor=True)
    tokenizer = Tokenizer.load(tmp_path)
    text = "hello world " * 1000
    assert asyncio.run(tokenizer.encode_text(text)) == tokenizer.encode(text, add_special_tokens=True)
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.render_chat(chat, True)
    assert asyncio.run(tokenizer.encode_chat(chat, True)) == tokenizer.encode(rendered, add_special_tokens=False)


def test_a_long_prompt_in_a_thread_lets_the_event_loop_run(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, {}, with_post_processor=True)
    tokenizer = Tokenizer.load(tmp_path)

    async def turns_meanwhile() -> int:
        encoding = asyncio.create_task(tokenizer.encode_text("hello world " * 60_000))
        turns = 0
        while not encoding.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert asyncio.run(turns_meanwhile()) > 20


def test_a_template_may_refuse_a_conversation(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, {"chat_template": CHAT_TEMPLATE}, with_post_processor=True)
    with pytest.raises(ChatTemplateError, match="unknown role tool"):
        Tokenizer.load(tmp_path).render_chat([{"role": "tool", "content": "x"}], True)


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ messages[9].content + 1 }}", "{{ nothing.x }}"],
)
def test_a_template_that_fails_or_reaches_out_of_its_sandbox_is_an_error_of_its_own(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], True)


def test_a_template_that_is_not_jinja_is_refused_at_load(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, {"chat_template": "{% if %}"}, with_post_processor=True)
    with pytest.raises(TokenizerError, match="chat template is not valid: line 1"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_kind_or_a_malformed_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist, only tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_model_without_a_tokenizer_has_ids_and_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.load(tmp_path)
    assert "no tokenizer in" in caplog.text
    assert not tokenizer.can_read_text and not tokenizer.can_chat
    for skip_special_tokens in (True, False):
        detokenizer = tokenizer.detokenizer(skip_special_tokens)
        assert detokenizer.extend([0, 31999, 5]) + detokenizer.flush() == ""
    assert tokenizer.token_text(17) == ""


def test_no_token_is_longer_than_the_bound_that_prompts_are_checked_with(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, {}, with_post_processor=True)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.can_read_text
    assert tokenizer.max_token_chars == len("<|user|>")
    assert tokenizer.token_text(1) == "</s>"
