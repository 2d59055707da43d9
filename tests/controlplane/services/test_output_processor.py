"""One choice's tokens on their way to the client: text, stops, ends, timings."""

import asyncio
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from controlplane.dispatch.output_stream import OutputChunk
from controlplane.errors import UnavailableError
from controlplane.messages import FinishReason, RequestOutcome
from controlplane.services.generate_params import OutputOptions
from controlplane.services.output_processor import ChoiceEnd, ChoiceFinished, GenerationOutput, GenerationStarted, OutputRules
from controlplane.text.detokenizer import Vocabulary
from controlplane.text.tokenizer import Tokenizer
from protos.planes import StepLogprobs

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS = len(ALPHABET)


def make_tokenizer() -> Tokenizer:
    """One token per byte, and an end of sequence."""
    tokenizer = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return Tokenizer(tokenizer, Vocabulary(tokenizer, ["ByteLevel"]), chat_template=None)


TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def feed(
    rules: OutputRules, token_ids: list[int], reason: FinishReason, run_length: int = 1
) -> tuple[list[OutputChunk], ChoiceFinished]:
    """Plays the dispatcher: runs of tokens until the sink wants to stop, then the end."""

    async def play() -> tuple[list[OutputChunk], ChoiceFinished]:
        output = GenerationOutput(1, rules, TOKENIZER, received_at=0.0, clock=lambda: 1.0)
        choice = output.choices[0]
        choice.on_started(0.0, 0.0)
        ended = reason
        for start in range(0, len(token_ids), run_length):
            if choice.on_tokens(token_ids[start : start + run_length], ()):
                ended = FinishReason.STOPPED
                break
        choice.on_finished(RequestOutcome(ended))
        started, *chunks, finished = [event async for event in output.stream]
        assert isinstance(started, GenerationStarted)
        assert isinstance(finished, ChoiceFinished)
        assert all(isinstance(chunk, OutputChunk) for chunk in chunks)
        return [chunk for chunk in chunks if isinstance(chunk, OutputChunk)], finished

    return asyncio.run(play())


def joined(chunks: list[OutputChunk]) -> tuple[list[int], str]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids], "".join(chunk.text for chunk in chunks)


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="aé🙂", max_size=8))
def test_without_a_stop_all_tokens_and_all_text_arrive(text: str) -> None:
    chunks, finished = feed(OutputRules(stop=("zz",)), ids(text), FinishReason.LENGTH)
    assert joined(chunks) == (ids(text), text)
    assert (finished.end, finished.completion_tokens) == (ChoiceEnd.LENGTH, len(ids(text)))


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="abcé🙂", max_size=12), st.sampled_from([(), ("bc",), ("a", "cb")]), st.integers(1, 9))
def test_however_tokens_come_together_the_client_gets_the_same(text: str, stop: tuple[str, ...], run_length: int) -> None:
    rules = OutputRules(stop=stop)
    chunks, finished = feed(rules, ids(text), FinishReason.LENGTH, run_length)
    one_by_one, finished_one_by_one = feed(rules, ids(text), FinishReason.LENGTH)
    assert joined(chunks) == joined(one_by_one)
    assert finished == finished_one_by_one


@pytest.mark.parametrize(("include_stop", "text"), [(False, "one "), (True, "one two")])
def test_a_stop_string_across_tokens_ends_text_before_it_and_tokens_with_the_one_that_completed_it(
    include_stop: bool, text: str
) -> None:
    rules = OutputRules(OutputOptions(include_stop=include_stop), stop=("three", "two"))
    chunks, finished = feed(rules, ids("one two three"), FinishReason.LENGTH)
    assert joined(chunks) == (ids("one two"), text)
    assert (finished.end, finished.matched_stop, finished.completion_tokens) == (ChoiceEnd.STOP, "two", 7)


def test_text_that_might_become_a_stop_is_held_back_and_shown_when_it_does_not() -> None:
    rules = OutputRules(stop=("abc",))
    chunks, _ = feed(rules, ids("xab"), FinishReason.LENGTH)
    assert joined(chunks)[1] == "xab"
    output = GenerationOutput(1, rules, TOKENIZER, 0.0, lambda: 0.0)
    for token_id in ids("xab"):
        output.choices[0].on_tokens([token_id], ())

    async def first() -> OutputChunk | GenerationStarted | ChoiceFinished:
        return await anext(output.stream)

    chunk = asyncio.run(first())
    assert isinstance(chunk, OutputChunk)
    assert chunk.text == "x"


def test_no_stop_string_before_min_tokens() -> None:
    chunks, finished = feed(OutputRules(stop=("a",), min_tokens=3), ids("aabab"), FinishReason.LENGTH)
    assert joined(chunks) == (ids("aaba"), "aab")
    assert finished.matched_stop == "a"


def test_a_stop_completed_by_the_last_token_wins_over_length() -> None:
    _, finished = feed(OutputRules(stop=("b",)), ids("ab"), FinishReason.LENGTH)
    assert (finished.end, finished.matched_stop) == (ChoiceEnd.STOP, "b")


@pytest.mark.parametrize(("show_special_tokens", "text"), [(False, "ab"), (True, "ab</s>")])
def test_end_of_sequence_is_counted_and_shown_only_among_special_tokens(show_special_tokens: bool, text: str) -> None:
    rules = OutputRules(OutputOptions(show_special_tokens=show_special_tokens), eos_token_ids=frozenset({EOS}))
    chunks, finished = feed(rules, [*ids("ab"), EOS], FinishReason.EOS)
    assert joined(chunks) == ([*ids("ab"), EOS], text)
    assert (finished.end, finished.matched_stop, finished.matched_stop_token_id) == (ChoiceEnd.STOP, None, None)
    assert finished.completion_tokens == 3


def test_an_end_of_sequence_that_is_not_special_is_not_shown_either() -> None:
    rules = OutputRules(eos_token_ids=frozenset(ids("!")))
    chunks, _ = feed(rules, ids("hi!"), FinishReason.EOS)
    assert joined(chunks) == (ids("hi!"), "hi")


@pytest.mark.parametrize(("include_stop", "text"), [(False, "hi"), (True, "hi!")])
def test_a_stop_token_is_named_and_shown_only_if_asked_for(include_stop: bool, text: str) -> None:
    rules = OutputRules(OutputOptions(include_stop=include_stop), stop_token_ids=frozenset(ids("!")))
    chunks, finished = feed(rules, ids("hi!"), FinishReason.STOP_TOKEN)
    assert joined(chunks) == (ids("hi!"), text)
    assert (finished.end, finished.matched_stop_token_id) == (ChoiceEnd.STOP_TOKEN, ids("!")[0])


def test_an_incomplete_character_at_the_end_is_shown_as_a_replacement() -> None:
    chunks, _ = feed(OutputRules(), ids("a🙂")[:-1], FinishReason.LENGTH)
    assert joined(chunks)[1] == "a�"


def test_token_ids_only_makes_no_text() -> None:
    chunks, _ = feed(OutputRules(OutputOptions(token_ids_only=True)), ids("hi"), FinishReason.LENGTH)
    assert joined(chunks) == (ids("hi"), "")


def test_at_end_sends_one_chunk() -> None:
    async def play() -> list[object]:
        output = GenerationOutput(1, OutputRules(OutputOptions(at_end=True)), TOKENIZER, 0.0, lambda: 0.0)
        choice = output.choices[0]
        choice.on_started(0.0, 0.0)
        assert isinstance(await anext(output.stream), GenerationStarted)
        for token_id in ids("hello"):
            choice.on_tokens([token_id], [StepLogprobs(-1.0)])
        choice.on_finished(RequestOutcome(FinishReason.LENGTH))
        return [event async for event in output.stream]

    chunk, finished = asyncio.run(play())
    assert chunk == OutputChunk(0, ids("hello"), ["hello"], [StepLogprobs(-1.0)] * 5)
    assert isinstance(finished, ChoiceFinished)


def test_choices_start_once_and_the_stream_ends_with_the_last() -> None:
    async def play() -> list[object]:
        output = GenerationOutput(2, OutputRules(), TOKENIZER, 0.0, lambda: 0.0)
        first, second = output.choices
        second.on_started(0.5, 0.25)
        second.on_tokens(ids("b"), ())
        first.on_started(0.75, 0.0)
        second.on_finished(RequestOutcome(FinishReason.LENGTH, num_preemptions=2))
        first.on_tokens(ids("a"), ())
        first.on_finished(RequestOutcome(FinishReason.EOS))
        return [event async for event in output.stream]

    events = asyncio.run(play())
    assert events[0] == GenerationStarted(0.5, 0.25)
    assert [type(event) for event in events].count(GenerationStarted) == 1
    finished = [event for event in events if isinstance(event, ChoiceFinished)]
    assert [(event.choice_index, event.num_preemptions) for event in finished] == [(1, 2), (0, 0)]


def test_an_error_ends_the_stream_after_what_was_made() -> None:
    async def play() -> list[object]:
        output = GenerationOutput(2, OutputRules(), TOKENIZER, 0.0, lambda: 0.0)
        output.choices[0].on_started(0.0, 0.0)
        output.choices[0].on_tokens(ids("a"), ())
        output.choices[1].on_finished(RequestOutcome(FinishReason.ERROR, error=UnavailableError("gone")))
        events: list[object] = []
        with pytest.raises(UnavailableError, match="gone"):
            async for event in output.stream:
                events.append(event)
        return events

    assert [type(event) for event in asyncio.run(play())] == [GenerationStarted, OutputChunk]


def test_the_demo_tokenizer_loads(repository: Path) -> None:
    tokenizer = Tokenizer.load(repository / "examples" / "demo" / "base")
    text = "Once upon a time"
    detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
    pieces = [detokenizer.extend([token_id]) for token_id in tokenizer.encode(text, add_special_tokens=True)]
    assert ("".join(pieces) + detokenizer.flush()).strip() == text
    assert tokenizer.can_chat
