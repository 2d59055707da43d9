"""Turns a growing list of token ids into text, piece by piece: the pieces add up to the tokenizer's own decode of all ids, and
none of them ends within a character.

Two ways, chosen by the tokenizer's decoder. Byte-level tokens are bytes, so an incremental UTF-8 decoder does it. Other
decoders (SentencePiece style) treat each token by itself except the first of a text and runs of byte tokens such as `<0xE2>`.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Decoders (and parts of a Sequence) that treat each token by itself, save what `_PieceDetokenizer` knows of.
_TOKENWISE_DECODERS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"})


class Detokenizer(ABC):
    """The text of one stream of tokens."""

    @abstractmethod
    def extend(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is certain now."""

    @abstractmethod
    def flush(self) -> str:
        """The rest of the text, once no more tokens come; an incomplete character becomes U+FFFD."""


class Vocabulary:
    """What detokenizers of one tokenizer share: the bytes or text of each token, worked out once."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder_types: Sequence[str]) -> None:
        """decoder_types: the types of the decoder as in tokenizer.json, a Sequence spelled out, empty for none.

        Raises:
            ValueError: text cannot be made token by token with this decoder.
        """
        unknown = sorted(set(decoder_types) - _TOKENWISE_DECODERS - {"ByteLevel"})
        self._is_byte_level = list(decoder_types) == ["ByteLevel"]
        if unknown or ("ByteLevel" in decoder_types and not self._is_byte_level):
            raise ValueError(
                f"the tokenizer's decoder {list(decoder_types)} is not supported: it must be ByteLevel alone, or a sequence of "
                + ", ".join(sorted(_TOKENWISE_DECODERS))
            )
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str] = {}
        self._anchor = () if self._is_byte_level else (self._find_anchor(),)
        self._anchor_text = self.decode(self._anchor)

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for a new stream."""
        if self._is_byte_level:
            return _ByteDetokenizer(self, skip_special_tokens)
        return _PieceDetokenizer(self, skip_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokenizer's own decode, special tokens included."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def decode_after_text(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add to a text that has begun already."""
        return self.decode((*self._anchor, *token_ids))[len(self._anchor_text) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level vocabulary; none for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._tokenizer.id_to_token(token_id) or ""
            try:
                found = bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:
                found = token.encode()
            self._bytes[token_id] = found
        return found

    def piece(self, token_id: int) -> str | None:
        """The text of a token amid a text, or None for a byte token, whose text depends on its neighbours."""
        found = self._pieces.get(token_id)
        if found is None:
            if self.is_byte_token(token_id):
                return None
            found = self._pieces[token_id] = self.decode_after_text((token_id,))
        return found

    def is_known(self, token_id: int) -> bool:
        """Whether the id names a token; decoders pass over ids that do not."""
        return token_id in self._pieces or self._tokenizer.id_to_token(token_id) is not None

    def is_byte_token(self, token_id: int) -> bool:
        """Whether the token is one byte in the form <0xE2>."""
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _find_anchor(self) -> int:
        """A plain token to put before others, so that the decoder does not take them for the beginning of a text."""
        for token, token_id in sorted(self._tokenizer.get_vocab(with_added_tokens=False).items()):
            if token.isascii() and token.isalnum() and self.decode((token_id,)) == token:
                return token_id
        raise ValueError("the tokenizer's vocabulary has no token that is a plain ASCII word")


class _ByteDetokenizer(Detokenizer):
    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def extend(self, token_ids: Sequence[int]) -> str:
        token_bytes, skipped = self._vocabulary.token_bytes, self._skipped
        return self._decoder.decode(b"".join([token_bytes(each) for each in token_ids if each not in skipped]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _PieceDetokenizer(Detokenizer):
    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        # Tokens whose text is not yet out: all of them while there is no text (the decoder treats a text's beginning
        # differently), later an open run of byte tokens, which decodes as one.
        self._pending: list[int] = []
        self._has_text = False

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join([self._append(token_id) for token_id in token_ids])

    def _append(self, token_id: int) -> str:
        if token_id in self._skipped or not self._vocabulary.is_known(token_id):
            return ""
        piece = self._vocabulary.piece(token_id)
        if piece is None:
            self._pending.append(token_id)
            return ""
        if self._has_text:
            return self._take_pending() + piece if self._pending else piece
        self._pending.append(token_id)
        text = self._vocabulary.decode(self._pending)
        if text:
            self._has_text = True
            self._pending.clear()
        return text

    def flush(self) -> str:
        return self._take_pending()

    def _take_pending(self) -> str:
        decode = self._vocabulary.decode_after_text if self._has_text else self._vocabulary.decode
        text = decode(self._pending)
        self._pending.clear()
        self._has_text = self._has_text or bool(text)
        return text


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
