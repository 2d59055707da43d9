"""The base model's tokenizer: prompts and conversations to token ids, as transformers makes them, without transformers.

Reads tokenizer.json, tokenizer_config.json and the chat template of a model directory. Knows nothing of requests.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from controlplane.text.chat_template import ChatTemplate
from controlplane.text.detokenizer import Detokenizer, Vocabulary

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# A model directory with one of these, and yet without a tokenizer.json, has a tokenizer that cannot be used here.
_OTHER_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Longer texts are tokenized in a thread, so that they hold up nobody else's tokens.
_INLINE_CHARS = 2048

_NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """The model directory's tokenizer cannot be used; the message names the file and what is wrong."""


class Tokenizer:
    """Text to token ids and back, for one base model."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._chat_template = chat_template
        # Without a vocabulary there are ids alone.
        self.can_read_text = tokenizer.get_vocab_size() > 0
        self.max_token_chars = max((len(token) for token in tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self._token_texts: dict[int, str] = {}

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Reads the tokenizer of a model directory; one that has none is served by token ids alone.

        Raises:
            TokenizerError: a file is missing, malformed, or asks for something that is not supported.
        """
        path = model_dir / TOKENIZER_FILE
        if not path.is_file():
            others = [name for name in _OTHER_TOKENIZER_FILES if (model_dir / name).exists()]
            if others:
                raise TokenizerError(
                    f"{path} does not exist, only {', '.join(others)}; convert the tokenizer to {TOKENIZER_FILE}"
                )
            log.warning("no tokenizer in %s: prompts are taken as token ids, and no text is made of what is generated", model_dir)
            return cls.of_ids_alone()
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: {error}") from error
        config = _read_json(model_dir / "tokenizer_config.json")
        special_map = _read_json(model_dir / "special_tokens_map.json")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        try:
            special_tokens = _named_special_tokens(config, special_map)
            _add_declared_tokens(tokenizer, config, special_tokens)
            vocabulary = Vocabulary(tokenizer, _decoder_types(json.loads(tokenizer.to_str())["decoder"]))
            chat_template = _chat_template(model_dir, config, special_tokens)
        except ValueError as error:
            raise TokenizerError(f"{model_dir}: {error}") from error
        return cls(tokenizer, vocabulary, chat_template)

    @classmethod
    def of_ids_alone(cls) -> "Tokenizer":
        """For a model without a tokenizer: no text can be read, and the text of every token is empty."""
        empty = tokenizers.Tokenizer(tokenizers.models.BPE())
        return cls(empty, Vocabulary(empty, ["ByteLevel"]), None)

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._chat_template is not None

    async def encode_text(self, text: str) -> tuple[int, ...]:
        """Plain text to ids, with the special tokens that the tokenizer adds around a text."""
        if len(text) <= _INLINE_CHARS:
            return self.encode(text, add_special_tokens=True)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> tuple[int, ...]:
        """A conversation to ids. The template writes the special tokens itself, so none are added.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        if sum(len(message["content"]) for message in messages) <= _INLINE_CHARS:
            return self._encode_chat(messages, add_generation_prompt)
        return await asyncio.to_thread(self._encode_chat, messages, add_generation_prompt)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Text to ids, at once."""
        # As a batch of one: unlike `encode`, that lets other threads run, so that a long text in a thread holds up nobody.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as text.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        assert self._chat_template is not None, "ask can_chat first"
        return self._chat_template.render(messages, add_generation_prompt)

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for a new stream of tokens."""
        return self._vocabulary.detokenizer(skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token on its own, special tokens shown."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._vocabulary.decode_after_text((token_id,))
        return text

    def _encode_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> tuple[int, ...]:
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _named_special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, tokenizers.AddedToken]:
    """Special tokens that have a name, such as bos_token."""
    entries = {name: config.get(name) if name in config else special_map.get(name) for name in _NAMED_SPECIAL_TOKENS}
    return {name: _special_token(entry) for name, entry in entries.items() if entry is not None}


def _special_token(entry: Any) -> tokenizers.AddedToken:
    """A special token as the configuration files write it: a text, or a text with flags."""
    if isinstance(entry, str):
        return tokenizers.AddedToken(entry, special=True, normalized=False)
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise ValueError(f"a token must be a text or an object with a content, found {entry!r:.80}")
    flags = {key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
    return tokenizers.AddedToken(entry["content"], special=True, **flags)


def _add_declared_tokens(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, tokenizers.AddedToken]
) -> None:
    """Adds what tokenizer_config.json declares and tokenizer.json lacks, as transformers does; named tokens are special.

    Its add_bos_token and add_eos_token are for directories without a tokenizer.json, whose post-processor decides here.
    """
    known = set(tokenizer.get_vocab(with_added_tokens=True))
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            flags = {key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "special")}
            flags["normalized"] = bool(entry.get("normalized", not flags["special"]))
            tokenizer.add_tokens([tokenizers.AddedToken(entry["content"], **flags)])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    tokenizer.add_special_tokens([*named.values(), *(_special_token(entry) for entry in extra)])


def _decoder_types(decoder: Mapping[str, Any] | None) -> list[str]:
    """The types of a decoder of tokenizer.json, a Sequence spelled out."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _decoder_types(inner)]
    if decoder["type"] == "Strip" and decoder["stop"] != 0:
        return [f"Strip(stop={decoder['stop']})"]
    return [decoder["type"]]


def _chat_template(
    model_dir: Path, config: Mapping[str, Any], special_tokens: Mapping[str, tokenizers.AddedToken]
) -> ChatTemplate | None:
    path = model_dir / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"chat_template must be a text or a list of named texts, found {type(source).__name__}")
    return ChatTemplate(source, {name: token.content for name, token in special_tokens.items()})
