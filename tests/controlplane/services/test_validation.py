"""Every field of GenerateRequest: its limits, and that each violation names field, value and limit."""

import math
from dataclasses import replace

import pytest
from google.protobuf import duration_pb2

from controlplane.errors import InvalidArgumentError
from controlplane.messages import DoesNotFit
from controlplane.services.generate_params import ChatPrompt, ModelLimits, TextPrompt, TokenPrompt
from controlplane.services.validation import MAX_VIOLATIONS, does_not_fit_error, parse_generate, resolve_max_tokens
from protos.loraplane.v1 import inference_pb2 as pb

LIMITS = ModelLimits(vocab_size=100, max_model_len=32, max_token_chars=8, can_chat=True)


def request(**fields: object) -> pb.GenerateRequest:
    if not {"text", "token_ids", "chat"} & set(fields):
        fields["text"] = "hello"
    return pb.GenerateRequest(**fields)  # type: ignore[arg-type]  # fields by name


def sampling(**fields: object) -> pb.GenerateRequest:
    return request(sampling=pb.SamplingParams(**fields))  # type: ignore[arg-type]  # fields by name


def violations(message: pb.GenerateRequest, limits: ModelLimits = LIMITS) -> dict[str, str]:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_generate(message, limits)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_unset_fields_take_the_documented_defaults() -> None:
    params = parse_generate(request(), LIMITS)
    assert params.prompt == TextPrompt("hello")
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.num_logprobs, params.ttft_slo_s) == (
        None,
        0,
        None,
        None,
        None,
    )
    assert (params.num_choices, params.priority, params.ignore_eos, params.adapter) == (1, 0, False, "")


def test_a_zero_that_was_set_is_not_a_default() -> None:
    params = parse_generate(
        request(logprobs=0, sampling=pb.SamplingParams(temperature=0, seed=0)),
        LIMITS,
    )
    assert (params.temperature, params.seed, params.num_logprobs) == (0.0, 0, 0)


@pytest.mark.parametrize(
    ("field", "bad", "value", "limit"),
    [
        ("max_tokens", 0, "0", "1 to 31"),
        ("max_tokens", 32, "32", "1 to 31"),
        ("min_tokens", 32, "32", "32"),
        ("temperature", -0.5, "-0.5", "0 to 100"),
        ("temperature", 100.5, "100.5", "0 to 100"),
        ("temperature", math.nan, "nan", "0 to 100"),
        ("temperature", math.inf, "inf", "0 to 100"),
        ("top_p", 0.0, "0", "above 0 and at most 1"),
        ("top_p", 1.5, "1.5", "above 0 and at most 1"),
        ("top_p", math.nan, "nan", "above 0 and at most 1"),
        ("min_p", -0.25, "-0.25", "0 to 1"),
        ("min_p", 1.25, "1.25", "0 to 1"),
        ("repetition_penalty", 0.0, "0", "above 0 and at most 10"),
        ("repetition_penalty", 10.5, "10.5", "above 0 and at most 10"),
        ("presence_penalty", -2.5, "-2.5", "-2 to 2"),
        ("presence_penalty", math.inf, "inf", "-2 to 2"),
        ("frequency_penalty", 2.5, "2.5", "-2 to 2"),
        ("frequency_penalty", -math.inf, "-inf", "-2 to 2"),
        ("n", 0, "0", "1 to 16"),
        ("n", 17, "17", "1 to 16"),
        ("stop", ["x"] * 17, "17 texts", "16"),
        ("stop_token_ids", [1] * 65, "65 ids", "64"),
    ],
)
def test_a_sampling_field_out_of_range_is_named_with_value_and_limit(field: str, bad: object, value: str, limit: str) -> None:
    found = violations(sampling(**{field: bad}))
    assert list(found) == [f"sampling.{field}"]
    assert value in found[f"sampling.{field}"]
    assert limit in found[f"sampling.{field}"]


@pytest.mark.parametrize(
    ("field", "good"),
    [
        ("max_tokens", 1),
        ("max_tokens", 31),
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_p", 1.0),
        ("min_p", 1.0),
        ("repetition_penalty", 10.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("n", 16),
        ("stop", ["x" * 256] * 16),
        ("stop_token_ids", [99] * 64),
        ("seed", 2**64 - 1),
    ],
)
def test_the_limit_itself_is_allowed(field: str, good: object) -> None:
    parse_generate(sampling(**{field: good}), LIMITS)


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (pb.GenerateRequest(), "input", "text, token_ids or chat"),
        (request(text=""), "text", "empty"),
        (request(text="x" * 257), "text", "257 characters"),
        (request(token_ids=pb.TokenIds()), "token_ids.ids", "empty"),
        (request(token_ids=pb.TokenIds(ids=[1] * 32)), "token_ids.ids", "32 tokens"),
        (request(token_ids=pb.TokenIds(ids=[1, 100])), "token_ids.ids[1]", "is 100; it must be below the vocabulary size, 100"),
        (request(chat=pb.ChatMessages()), "chat.messages", "at least 1 message"),
        (request(chat=pb.ChatMessages(messages=[pb.ChatMessage(content="x")])), "chat.messages[0].role", "empty"),
        (request(request_id="x" * 129), "request_id", "129 characters"),
        (request(request_id="naïve"), "request_id", "printable ASCII"),
        (request(adapter="x" * 257), "adapter", "257 characters"),
        (request(logprobs=21), "logprobs", "is 21; it must be from 0 to 20"),
        (request(priority=101), "priority", "is 101; it must be from -100 to 100"),
        (request(priority=-101), "priority", "is -101"),
        (request(ttft_slo=duration_pb2.Duration()), "ttft_slo", "is 0 s; it must be above 0"),
        (request(ttft_slo=duration_pb2.Duration(seconds=-1)), "ttft_slo", "is -1 s"),
        (sampling(stop=["ok", ""]), "sampling.stop[1]", "0 characters"),
        (sampling(stop=["x" * 257]), "sampling.stop[0]", "257 characters"),
        (sampling(stop_token_ids=[3, 100]), "sampling.stop_token_ids[1]", "is 100"),
        (sampling(max_tokens=3, min_tokens=4), "sampling.min_tokens", "is 4; it must be at most max_tokens, 3"),
        (
            request(sampling=pb.SamplingParams(stop=["x"]), output=pb.OutputOptions(token_ids_only=True)),
            "sampling.stop",
            "token_ids_only",
        ),
    ],
)
def test_a_bad_field_is_named(message: pb.GenerateRequest, field: str, words: str) -> None:
    found = violations(message)
    assert list(found) == [field]
    assert words in found[field]


def test_all_violations_are_told_at_once() -> None:
    message = request(
        text="", logprobs=99, priority=1000, sampling=pb.SamplingParams(temperature=-1, top_p=2, n=99, max_tokens=0, stop=[""])
    )
    assert set(violations(message)) == {
        "text",
        "logprobs",
        "priority",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.n",
        "sampling.max_tokens",
        "sampling.stop[0]",
    }


def test_many_bad_token_ids_are_counted_and_not_all_listed() -> None:
    found = violations(request(token_ids=pb.TokenIds(ids=[500] * 31)))
    assert len(found) == 9
    assert "31 ids" in found["token_ids.ids"]


def test_a_hostile_message_costs_a_bounded_number_of_violations() -> None:
    found = violations(request(chat=pb.ChatMessages(messages=[pb.ChatMessage()] * 10_000)))
    assert "10000 messages" in found["chat.messages"]
    assert len(found) <= MAX_VIOLATIONS
    found = violations(request(token_ids=pb.TokenIds(ids=[500] * 10_000)))
    assert "32 ids" in found["token_ids.ids"]
    assert len(found) <= MAX_VIOLATIONS


def test_what_lies_past_a_limit_is_not_looked_at() -> None:
    messages = [pb.ChatMessage(role="user")] * LIMITS.max_model_len + [pb.ChatMessage(role="user", content="x" * 1000)]
    assert list(violations(request(chat=pb.ChatMessages(messages=messages)))) == ["chat.messages"]
    assert "33 messages" in violations(request(chat=pb.ChatMessages(messages=messages)))["chat.messages"]
    assert list(violations(sampling(stop=["x"] * 16 + [""]))) == ["sampling.stop"]


def test_chat_without_a_template_is_refused() -> None:
    limits = replace(LIMITS, can_chat=False)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    assert "no chat template" in violations(request(chat=chat), limits)["chat"]
    params = parse_generate(request(chat=chat), LIMITS)
    assert params.prompt == ChatPrompt(({"role": "user", "content": "hi"},), add_generation_prompt=True)


def test_without_a_tokenizer_everything_that_needs_text_is_refused() -> None:
    limits = replace(LIMITS, can_chat=False, can_read_text=False)
    ids = pb.TokenIds(ids=[1, 2])
    assert parse_generate(request(token_ids=ids), limits).prompt == TokenPrompt((1, 2))
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    found = violations(request(chat=chat, sampling=pb.SamplingParams(stop=["x"])), limits)
    assert found.keys() == {"chat", "sampling.stop"}
    found |= violations(request(text="hello"), limits)
    assert found.keys() == {"chat", "sampling.stop", "text"}
    assert all("no tokenizer" in description for description in found.values())


def test_a_top_k_of_the_whole_vocabulary_keeps_all() -> None:
    assert parse_generate(sampling(top_k=100), LIMITS).top_k == 0
    assert parse_generate(sampling(top_k=99), LIMITS).top_k == 99


def test_unset_max_tokens_is_what_the_prompt_leaves() -> None:
    assert resolve_max_tokens(parse_generate(request(), LIMITS), 5, LIMITS) == 27


def test_prompt_and_output_may_fill_the_model_exactly() -> None:
    params = parse_generate(sampling(max_tokens=27), LIMITS)
    assert resolve_max_tokens(params, 5, LIMITS) == 27
    with pytest.raises(InvalidArgumentError, match=r"is 27; with the prompt's 6 tokens that makes 33, over the limit of 32"):
        resolve_max_tokens(params, 6, LIMITS)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "reason", "words"), [(0, "PROMPT_EMPTY", "no tokens"), (32, "PROMPT_TOO_LONG", "at most 31")]
)
def test_a_prompt_without_tokens_or_without_room_is_refused(num_prompt_tokens: int, reason: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        resolve_max_tokens(parse_generate(request(), LIMITS), num_prompt_tokens, LIMITS)
    assert caught.value.reason == reason
    assert caught.value.violations[0].field == "text"


def test_min_tokens_must_fit_after_the_prompt() -> None:
    params = parse_generate(sampling(min_tokens=30), LIMITS)
    with pytest.raises(InvalidArgumentError, match=r"is 30; after the prompt's 5 tokens only 27"):
        resolve_max_tokens(params, 5, LIMITS)


def test_a_request_larger_than_the_pool_is_told_its_pages() -> None:
    params = parse_generate(request(token_ids=pb.TokenIds(ids=[1, 2]), sampling=pb.SamplingParams(max_tokens=20)), LIMITS)
    assert params.prompt == TokenPrompt((1, 2))
    error = does_not_fit_error(params, 2, 20, DoesNotFit(kv_pages=3, adapter_pages=4, available_pages=5))
    assert error.violations[0].field == "sampling.max_tokens"
    assert "need 3 pages and its adapter 4; the largest data plane has 5" in error.violations[0].description
