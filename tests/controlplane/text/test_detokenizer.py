"""Pieces of text add up to the tokenizer's own decode, for byte-level and SentencePiece-style vocabularies."""

import json
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from controlplane.text.detokenizer import Vocabulary

CORPUS = ["the quick brown fox jumps over the lazy dog", "größer als Äpfel, naïve café", "日本語 テキスト 🙂🙃", "  two  spaces"]
SPECIALS = ["<s>", "</s>"]


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it."""
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "a", "b", "▁a", "▁the", "é", "!", "▁日", "�"]
    tokenizer = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    tokens = ["<unk>", "▁", "▁▁▁", "a", "b", "▁a", "▁the▁", "é", "!"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(t, -1.0) for t in tokens], unk_id=0))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def no_decoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c.": 2}, "a"))


KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], list[str]]] = {
    "byte-level": (byte_level, ["ByteLevel"]),
    "byte-fallback": (byte_fallback, ["Replace", "ByteFallback", "Fuse", "Strip"]),
    "metaspace": (metaspace, ["Metaspace"]),
    "no-decoder": (no_decoder, []),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_pieces_add_up_to_the_decode_of_all_ids(kind: str, skip_special_tokens: bool) -> None:
    make, decoder_types = KINDS[kind]
    tokenizer = make()
    vocabulary = Vocabulary(tokenizer, decoder_types)
    size = tokenizer.get_vocab_size()
    # Past the vocabulary too: a model's embedding is often larger than its tokenizer.
    ids = st.lists(st.one_of(st.integers(0, size + 3), st.integers(max(0, size - 12), size - 1)), max_size=30)

    @settings(deadline=None, max_examples=200)
    @given(ids, st.integers(1, 4))
    def check(token_ids: list[int], run_length: int) -> None:
        detokenizer = vocabulary.detokenizer(skip_special_tokens)
        runs = [token_ids[start : start + run_length] for start in range(0, len(token_ids), run_length)]
        text = "".join(map(detokenizer.extend, runs)) + detokenizer.flush()
        assert text == tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    check()


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_no_piece_ends_within_a_character(kind: str) -> None:
    make, decoder_types = KINDS[kind]
    tokenizer = make()
    vocabulary = Vocabulary(tokenizer, decoder_types)

    @settings(deadline=None, max_examples=100)
    @given(st.text(alphabet="aé日🙂 \u0301", max_size=12))
    def check(text: str) -> None:
        detokenizer = vocabulary.detokenizer(skip_special_tokens=True)
        pieces = [detokenizer.extend([token_id]) for token_id in tokenizer.encode(text, add_special_tokens=False).ids]
        assert not any("�" in piece for piece in [*pieces, detokenizer.flush()])

    check()


def test_byte_level_text_is_shown_as_soon_as_its_character_is_complete() -> None:
    vocabulary = Vocabulary(byte_level(), ["ByteLevel"])
    tokenizer = byte_level()
    euro = [tokenizer.get_vocab()[char] for char in ("â", "Ĥ", "¬")]
    detokenizer = vocabulary.detokenizer(skip_special_tokens=True)
    assert [detokenizer.extend([token_id]) for token_id in euro] == ["", "", "€"]


def test_an_unknown_decoder_is_refused_by_name() -> None:
    tokenizer = byte_level()
    assert json.loads(tokenizer.to_str())["decoder"]["type"] == "ByteLevel"
    with pytest.raises(ValueError, match="CTC"):
        Vocabulary(tokenizer, ["CTC"])
