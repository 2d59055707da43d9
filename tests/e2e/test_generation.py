"""What a request may ask for besides greedy tokens, over the real engine and against references made of transformers' logits."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from google.protobuf.message import Message
from transformers import PreTrainedTokenizerFast

from protos.loraplane.v1 import inference_pb2, system_pb2

if TYPE_CHECKING:
    from tests.e2e.conftest import Prompt, Service, TinyModel

    Build = Callable[..., TinyModel]
    Greedy = Callable[[TinyModel, Sequence[Prompt], int], list[tuple[int, ...]]]
    Logits = Callable[[TinyModel, str, Sequence[int]], torch.Tensor]

RANKS = (2, 8, 12, 16)
MAX_TOKENS = 30


def _tokenizer(base: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(base)


def test_logprobs_are_the_log_softmax_of_the_model_whatever_the_sampling(
    build_model: "Build", reference_logits: "Logits", run_service: Any
) -> None:
    model = build_model("llama", RANKS)
    adapter = list(model.adapters)[2]
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.7, "seed": 3, "top_k": 30},
        {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ]

    async def scenario(service: "Service") -> None:
        await service.register_all()
        for name in ("", adapter):
            for number, sampling in enumerate(samplings):
                prompt = (5, 6, 7 + number)
                request = service.request(name, prompt, max_tokens=MAX_TOKENS, ignore_eos=True, n=2, **sampling)
                request.logprobs = 5
                for answer in await service.stream(request):
                    ids = [*prompt, *answer.token_ids]
                    want = reference_logits(model, name, ids).log_softmax(-1)[len(prompt) - 1 : -1]
                    assert len(answer.logprobs) == len(answer.token_ids) == MAX_TOKENS
                    for row, token_id, entry in zip(want, answer.token_ids, answer.logprobs, strict=True):
                        assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-3)
                        best = row.topk(5)
                        assert [top.token_id for top in entry.top] == best.indices.tolist()
                        assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)

    # Small enough that requests of several choices are cut into chunks.
    run_service(model, scenario, token_budget=9, max_num_seqs=8)


def _reference_penalized(
    logits_of: Callable[[Sequence[int]], torch.Tensor], prompt: Sequence[int], options: dict[str, Any], banned: set[int]
) -> list[int]:
    """Greedy decoding by the words of inference.proto, one token at a time, in plain Python."""
    output: list[int] = []
    for _ in range(MAX_TOKENS):
        row = logits_of([*prompt, *output])[-1].clone()
        for token in {*prompt, *output}:
            penalty = options.get("repetition_penalty", 1.0)
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        for token, count in Counter(output).items():
            row[token] -= options.get("presence_penalty", 0.0) + count * options.get("frequency_penalty", 0.0)
        if len(output) < options.get("min_tokens", 0):
            row[list(banned)] = -torch.inf
        output.append(int(row.argmax()))
        if output[-1] in banned:
            break
    return output


def test_penalties_and_min_tokens_do_what_the_contract_says(
    build_model: "Build", reference_logits: "Logits", reference_greedy: "Greedy", run_service: Any
) -> None:
    model = build_model("qwen2", RANKS)
    adapter = list(model.adapters)[1]
    prompt = (5, 6, 7, 5)
    variants: list[dict[str, Any]] = [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 2.0},
        {"presence_penalty": -1.5, "frequency_penalty": 0.7},
        {"frequency_penalty": 2.0, "repetition_penalty": 1.3},
        {"min_tokens": 12},
        {"min_tokens": 12, "frequency_penalty": 1.0},
    ]
    plain = dict(zip(("", adapter), reference_greedy(model, [("", prompt), (adapter, prompt)], MAX_TOKENS), strict=True))

    async def scenario(service: "Service") -> None:
        await service.register_all()
        for name, tokens in plain.items():
            for options in variants:
                # With min_tokens, the model's third choice would end the answer if nothing kept it from that.
                stops = {tokens[2]} if "min_tokens" in options else set()
                expected = _reference_penalized(partial(reference_logits, model, name), prompt, options, {2, *stops})
                assert expected != list(tokens), f"{options} makes no difference"
                answer = await service.generate(name, prompt, max_tokens=MAX_TOKENS, stop_token_ids=sorted(stops), **options)
                assert answer.token_ids == expected, (name, options)
                assert answer.finished is not None
                if len(expected) == MAX_TOKENS:
                    assert answer.finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH
                elif expected[-1] in stops:
                    assert answer.finished.matched_stop_token_id == expected[-1]
                assert answer.finished.usage.completion_tokens == len(expected)

    run_service(model, scenario, num_pages=40)


def test_stop_strings_end_answers_across_tokens(build_model: "Build", reference_greedy: "Greedy", run_service: Any) -> None:
    model = build_model("llama", RANKS)
    tokenizer = _tokenizer(model.base)
    rng = random.Random(2)
    prompts = [(name, tuple(rng.randrange(3, 199) for _ in range(5))) for name in ("", *model.adapters) for _ in range(6)]
    cases = []
    for prompt, tokens in zip(prompts, reference_greedy(model, prompts, 60), strict=True):
        text = tokenizer.decode(tokens)
        # Three characters, one token each, that show up for the first time after some others.
        found = next((i for i in range(4, len(text) - 3) if text[i : i + 3].isascii() and text.index(text[i : i + 3]) == i), None)
        if found is not None:
            stop = text[found : found + 3]
            end = next(n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
            cases.append((prompt, tokens, text, stop, found, end))
    assert len(cases) >= 6

    async def ask(service: "Service", case: tuple[Any, ...]) -> None:
        (adapter, ids), tokens, text, stop, start, end = case
        for include, min_tokens in ((False, 0), (True, 0), (False, end + 1)):
            request = service.request(adapter, ids, max_tokens=60, stop=["never there", stop], min_tokens=min_tokens)
            request.output.include_stop = include
            (answer,) = await service.stream(request)
            assert answer.finished is not None
            if min_tokens:
                assert len(answer.token_ids) > end, "the stop came before min_tokens"
                continue
            assert answer.token_ids == list(tokens[:end])
            assert answer.text == text[: start + 3 * include]
            assert (answer.finished.finish_reason, answer.finished.matched_stop) == (inference_pb2.FINISH_REASON_STOP, stop)
            assert answer.finished.usage.completion_tokens == end

    async def scenario(service: "Service") -> None:
        await service.register_all()
        await asyncio.gather(*(ask(service, case) for case in cases))

    run_service(model, scenario)


def test_a_text_and_a_conversation_are_answered_as_through_transformers(
    build_model: "Build", reference_greedy: "Greedy", run_service: Any
) -> None:
    model = build_model("llama", RANKS)
    adapter = list(model.adapters)[1]
    tokenizer = _tokenizer(model.base)
    messages = [{"role": "system", "content": "Be-brief."}, {"role": "user", "content": "  Who-are-you?\n"}]
    chats = [tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=add)["input_ids"]) for add in (True, False)]
    text = tuple(tokenizer("Once-upon-a-time")["input_ids"])
    expected = reference_greedy(model, [(adapter, chats[0]), (adapter, chats[1]), (adapter, text)], MAX_TOKENS)

    async def scenario(service: "Service") -> None:
        await service.register_all()
        turns = [inference_pb2.ChatMessage(**message) for message in messages]
        inputs: list[dict[str, Any]] = [
            {"chat": inference_pb2.ChatMessages(messages=turns)},
            {"chat": inference_pb2.ChatMessages(messages=turns, add_generation_prompt=False)},
            {"text": "Once-upon-a-time"},
        ]
        for fields, want, prompt in zip(inputs, expected, (*chats, text), strict=True):
            sampling = inference_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
            (answer,) = await service.stream(inference_pb2.GenerateRequest(adapter=adapter, sampling=sampling, **fields))
            assert tuple(answer.token_ids) == want
            assert answer.text == tokenizer.decode(want, skip_special_tokens=True)
            assert answer.started is not None and answer.started.prompt_tokens == len(prompt)

    run_service(model, scenario)


def test_information_and_load_leave_no_field_unset_while_requests_run(build_model: "Build", run_service: Any) -> None:
    model = build_model("llama", RANKS)
    adapter = list(model.adapters)[1]

    async def scenario(service: "Service") -> None:
        await service.register_all()
        running = asyncio.create_task(service.generate(adapter, (5, 6), max_tokens=400, ignore_eos=True))
        load = system_pb2.GetLoadResponse()
        async with asyncio.timeout(60):
            while not (load.data_planes and load.data_planes[0].pool.kv_pages > 1 and load.output_tokens_per_s):
                load = await service.system.GetLoad(system_pb2.GetLoadRequest())
                await asyncio.sleep(0.01)
        info = await service.system.GetServerInfo(system_pb2.GetServerInfoRequest())
        assert _unset_fields(info) == set()
        may_be_zero = {"num_waiting", "draining", "data_planes.num_preemptions", "data_planes.pool.idle_adapter_pages"}
        assert _unset_fields(load) <= may_be_zero
        plane = load.data_planes[0]
        pool = plane.pool
        assert pool.kv_pages + pool.adapter_pages + pool.free_pages == pool.num_pages == 256
        assert [(list(a.names), a.num_requests) for a in plane.adapters] == [([adapter], 1)]
        assert plane.adapters[0].num_pages == pool.adapter_pages
        await running

    run_service(model, scenario, control_plane={"idle_prefetch": False})


def _unset_fields(message: Message, prefix: str = "") -> set[str]:
    """Paths of the fields that say nothing."""
    unset = set()
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if not (message.HasField(field.name) if field.message_type and not field.is_repeated else value):
            unset.add(prefix + field.name)
        elif field.message_type and field.message_type.full_name.startswith("loraplane"):
            for inner in value if field.is_repeated else [value]:
                unset |= _unset_fields(inner, f"{prefix}{field.name}.")
    return unset


def test_without_max_tokens_a_small_pool_limits_the_answer_and_refuses_nothing(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))
    num_pages, page_tokens = 36, 16

    async def scenario(service: "Service") -> None:
        *_, largest = await service.register_all()
        prompt = (5, 6, 7)
        answer = await service.generate(largest.name, prompt, ignore_eos=True)
        assert len(answer.token_ids) == (num_pages - largest.current.num_pages) * page_tokens - len(prompt)
        assert answer.finished is not None
        assert answer.finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH

    run_service(model, scenario, num_pages=num_pages)
