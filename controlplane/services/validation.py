"""Checks a GenerateRequest field by field and turns it into our own dataclasses, every default filled in.

Collects all violations, each with field, value and limit. Knows the limits of `inference.proto` and of the model, nothing of
tokenizers, adapters or load.
"""

import math
import re
from collections.abc import Iterable, Sequence

from controlplane.errors import FieldViolation, InvalidArgumentError
from controlplane.messages import DoesNotFit
from controlplane.services.generate_params import ChatPrompt, GenerateParams, ModelLimits, OutputOptions, TextPrompt, TokenPrompt
from protos.loraplane.v1 import inference_pb2 as pb
from protos.planes import duration_to_seconds

MAX_REQUEST_ID_CHARS = 128
MAX_ADAPTER_CHARS = 256
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_CHOICES = 16
# Listed at once; a client that has this many wrong has read enough.
MAX_VIOLATIONS = 64

_NO_TOKENIZER = "is set, but this model has no tokenizer (its directory has no tokenizer.json)"

_PRINTABLE_ASCII = re.compile(r"[\x20-\x7e]*")
_SHOWN_CHARS = 60


class _Checks:
    """Collects the violations of one request."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def require(self, holds: bool, field: str, description: str) -> None:
        if not holds and len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(FieldViolation(field, description))

    def number(self, field: str, value: float, low: float, high: float, *, above_low: bool = False) -> float:
        holds = math.isfinite(value) and (low < value if above_low else low <= value) and value <= high
        limits = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        self.require(holds, field, f"is {value:g}; it must be {limits}")
        return value

    def token_ids(self, field: str, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
        checked = tuple(ids)
        if max(checked, default=0) < vocab_size:
            return checked
        wrong = [(index, token_id) for index, token_id in enumerate(checked) if token_id >= vocab_size]
        for index, token_id in wrong[:8]:
            limit = f"it must be below the vocabulary size, {vocab_size}"
            self.require(False, f"{field}[{index}]", f"is {token_id}; {limit}")
        self.require(len(wrong) <= 8, field, f"{len(wrong)} ids are not below the vocabulary size, {vocab_size}")
        return checked


def parse_generate(request: pb.GenerateRequest, limits: ModelLimits) -> GenerateParams:
    """Checks everything that can be checked before the prompt is tokenized.

    Raises:
        InvalidArgumentError: naming every field that is wrong.
    """
    checks = _Checks()
    _check_names(checks, request)
    prompt = _parse_prompt(checks, request, limits)
    sampling = request.sampling
    output = OutputOptions(
        include_stop=request.output.include_stop,
        show_special_tokens=request.output.show_special_tokens,
        at_end=request.output.at_end,
        token_ids_only=request.output.token_ids_only,
    )
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
    _check_lengths(checks, max_tokens, sampling.min_tokens, limits)
    num_stop_ids = len(sampling.stop_token_ids)
    checks.require(
        num_stop_ids <= MAX_STOP_TOKEN_IDS,
        "sampling.stop_token_ids",
        f"has {num_stop_ids} ids; at most {MAX_STOP_TOKEN_IDS} are allowed",
    )
    params = GenerateParams(
        request_id=request.request_id,
        prompt=prompt,
        adapter=request.adapter,
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=checks.number("sampling.temperature", _or(sampling, "temperature", 1.0), 0, MAX_TEMPERATURE),
        top_p=checks.number("sampling.top_p", _or(sampling, "top_p", 1.0), 0, 1, above_low=True),
        # As many as the vocabulary has, or more, is all: 0 to the engine.
        top_k=sampling.top_k if sampling.top_k < limits.vocab_size else 0,
        min_p=checks.number("sampling.min_p", sampling.min_p, 0, 1),
        seed=sampling.seed if sampling.HasField("seed") else None,
        repetition_penalty=checks.number(
            "sampling.repetition_penalty", _or(sampling, "repetition_penalty", 1.0), 0, MAX_REPETITION_PENALTY, above_low=True
        ),
        presence_penalty=checks.number("sampling.presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=checks.number("sampling.frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
        stop=_parse_stops(checks, sampling.stop, output, limits),
        stop_token_ids=checks.token_ids(
            "sampling.stop_token_ids", sampling.stop_token_ids[:MAX_STOP_TOKEN_IDS], limits.vocab_size
        ),
        ignore_eos=sampling.ignore_eos,
        num_choices=int(checks.number("sampling.n", sampling.n if sampling.HasField("n") else 1, 1, MAX_CHOICES)),
        num_logprobs=int(checks.number("logprobs", request.logprobs, 0, MAX_LOGPROBS)) if request.HasField("logprobs") else None,
        priority=int(checks.number("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)),
        ttft_slo_s=_parse_ttft_slo(checks, request),
        output=output,
    )
    if checks.violations:
        raise InvalidArgumentError(checks.violations)
    return params


def resolve_max_tokens(params: GenerateParams, num_prompt_tokens: int, limits: ModelLimits) -> int:
    """How many tokens the request may generate, once the length of its prompt is known.

    Raises:
        InvalidArgumentError: the prompt is empty, or prompt and output do not fit the model's length limit.
    """
    field = _prompt_field(params.prompt)
    if num_prompt_tokens == 0:
        raise InvalidArgumentError.of(field, "the prompt has no tokens; it must have at least 1", reason="PROMPT_EMPTY")
    room = limits.max_model_len - num_prompt_tokens
    if room < 1:
        raise InvalidArgumentError.of(
            field,
            f"the prompt has {num_prompt_tokens} tokens; prompt and output together may have {limits.max_model_len}, "
            f"so the prompt may have at most {limits.max_model_len - 1}",
            reason="PROMPT_TOO_LONG",
        )
    if params.max_tokens is None:
        if params.min_tokens > room:
            raise InvalidArgumentError.of(
                "sampling.min_tokens",
                f"is {params.min_tokens}; after the prompt's {num_prompt_tokens} tokens only {room} of the model's "
                f"{limits.max_model_len} are left",
                reason="LENGTH_OVER_LIMIT",
            )
        return room
    if params.max_tokens > room:
        raise InvalidArgumentError.of(
            "sampling.max_tokens",
            f"is {params.max_tokens}; with the prompt's {num_prompt_tokens} tokens that makes "
            f"{num_prompt_tokens + params.max_tokens}, over the limit of {limits.max_model_len}; at most {room} are left",
            reason="LENGTH_OVER_LIMIT",
        )
    return params.max_tokens


def does_not_fit_error(params: GenerateParams, num_prompt_tokens: int, max_tokens: int, why: DoesNotFit) -> InvalidArgumentError:
    """The request keeps the model's limits and yet could never run: the page pool is too small for it."""
    adapter = f" and its adapter {why.adapter_pages}" if why.adapter_pages else ""
    return InvalidArgumentError.of(
        _prompt_field(params.prompt) if params.max_tokens is None else "sampling.max_tokens",
        f"{num_prompt_tokens} prompt tokens and up to {max_tokens} output tokens need {why.kv_pages} pages{adapter}; "
        f"the largest data plane has {why.available_pages}; ask for fewer tokens",
        reason="POOL_TOO_SMALL",
    )


def shorten(text: str) -> str:
    """A caller's text, quoted, for a message."""
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")


def _or(sampling: pb.SamplingParams, field: str, default: float) -> float:
    value: float = getattr(sampling, field)
    return value if sampling.HasField(field) else default  # type: ignore[arg-type]  # field is one of its names


def _prompt_field(prompt: TextPrompt | TokenPrompt | ChatPrompt) -> str:
    return {TextPrompt: "text", TokenPrompt: "token_ids.ids", ChatPrompt: "chat.messages"}[type(prompt)]


def _check_names(checks: _Checks, request: pb.GenerateRequest) -> None:
    length = len(request.request_id)
    checks.require(
        length <= MAX_REQUEST_ID_CHARS, "request_id", f"has {length} characters; at most {MAX_REQUEST_ID_CHARS} are allowed"
    )
    checks.require(
        _PRINTABLE_ASCII.fullmatch(request.request_id) is not None,
        "request_id",
        f"is {shorten(request.request_id)}; only printable ASCII is allowed",
    )
    length = len(request.adapter)
    checks.require(length <= MAX_ADAPTER_CHARS, "adapter", f"has {length} characters; at most {MAX_ADAPTER_CHARS} are allowed")


def _parse_prompt(checks: _Checks, request: pb.GenerateRequest, limits: ModelLimits) -> TextPrompt | TokenPrompt | ChatPrompt:
    kind = request.WhichOneof("input")
    if kind == "token_ids":
        num_ids = len(request.token_ids.ids)
        checks.require(num_ids > 0, "token_ids.ids", "is empty; a prompt needs at least 1 token")
        checks.require(
            num_ids < limits.max_model_len,
            "token_ids.ids",
            f"has {num_ids} tokens; the model's limit is {limits.max_model_len}, output included",
        )
        # Those of a prompt that is too long are not looked at: a message holds millions.
        ids = request.token_ids.ids[: limits.max_model_len]
        return TokenPrompt(checks.token_ids("token_ids.ids", ids, limits.vocab_size))
    if kind == "chat":
        return _parse_chat(checks, request.chat, limits)
    checks.require(kind is not None, "input", "is not set; give one of text, token_ids or chat")
    checks.require(kind is None or request.text != "", "text", "is empty; a prompt needs at least 1 character")
    if limits.can_read_text:
        _check_text_length(checks, "text", len(request.text), limits)
    else:
        checks.require(kind is None, "text", f"{_NO_TOKENIZER}; use token_ids")
    return TextPrompt(request.text)


def _parse_chat(checks: _Checks, chat: pb.ChatMessages, limits: ModelLimits) -> ChatPrompt:
    if not limits.can_read_text:
        checks.require(False, "chat", f"{_NO_TOKENIZER}; use token_ids")
        return ChatPrompt((), False)
    checks.require(limits.can_chat, "chat", "is set, but this model's tokenizer has no chat template; use text or token_ids")
    num_messages = len(chat.messages)
    checks.require(num_messages > 0, "chat.messages", "is empty; a conversation needs at least 1 message")
    checks.require(
        num_messages <= limits.max_model_len,
        "chat.messages",
        f"has {num_messages} messages; {limits.max_model_len} tokens, the model's limit, cannot hold more than as many",
    )
    # Those past the limit are not looked at: a message holds millions.
    messages = tuple({"role": each.role, "content": each.content} for each in chat.messages[: limits.max_model_len])
    for index, message in enumerate(messages):
        checks.require(message["role"] != "", f"chat.messages[{index}].role", "is empty; it must be set, such as to 'user'")
    num_chars = sum(len(message["content"]) + len(message["role"]) for message in messages)
    _check_text_length(checks, "chat.messages", num_chars, limits)
    return ChatPrompt(messages, chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True)


def _check_text_length(checks: _Checks, field: str, num_chars: int, limits: ModelLimits) -> None:
    checks.require(
        num_chars <= limits.max_prompt_chars,
        field,
        f"has {num_chars} characters; {limits.max_model_len} tokens, the model's limit, "
        f"cannot be more than {limits.max_prompt_chars}",
    )


def _check_lengths(checks: _Checks, max_tokens: int | None, min_tokens: int, limits: ModelLimits) -> None:
    if max_tokens is not None:
        checks.require(
            1 <= max_tokens < limits.max_model_len,
            "sampling.max_tokens",
            f"is {max_tokens}; it must be from 1 to {limits.max_model_len - 1}, "
            f"as prompt and output together may have {limits.max_model_len} tokens",
        )
        checks.require(
            min_tokens <= max_tokens, "sampling.min_tokens", f"is {min_tokens}; it must be at most max_tokens, {max_tokens}"
        )
    else:
        checks.require(
            min_tokens < limits.max_model_len,
            "sampling.min_tokens",
            f"is {min_tokens}; it must be below the model's length limit, {limits.max_model_len}",
        )


def _parse_stops(checks: _Checks, stops: Sequence[str], output: OutputOptions, limits: ModelLimits) -> tuple[str, ...]:
    checks.require(limits.can_read_text or not stops, "sampling.stop", f"{_NO_TOKENIZER}; use stop_token_ids")
    checks.require(len(stops) <= MAX_STOPS, "sampling.stop", f"has {len(stops)} texts; at most {MAX_STOPS} are allowed")
    kept = tuple(stops[:MAX_STOPS])
    for index, stop in enumerate(kept):
        checks.require(
            1 <= len(stop) <= MAX_STOP_CHARS,
            f"sampling.stop[{index}]",
            f"has {len(stop)} characters; it must have from 1 to {MAX_STOP_CHARS}",
        )
    checks.require(
        not (stops and output.token_ids_only),
        "sampling.stop",
        "is set together with output.token_ids_only; stop strings need text, so leave one of them out",
    )
    return kept


def _parse_ttft_slo(checks: _Checks, request: pb.GenerateRequest) -> float | None:
    if not request.HasField("ttft_slo"):
        return None
    seconds = duration_to_seconds(request.ttft_slo)
    checks.require(seconds > 0, "ttft_slo", f"is {seconds:g} s; it must be above 0")
    return seconds
