"""Every value that a field may have is served: none of them ends in an error, alone or together with others."""

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from google.protobuf import duration_pb2

from protos.loraplane.v1 import inference_pb2

if TYPE_CHECKING:
    from tests.e2e.conftest import Answer, Service, TinyModel

NUM_REQUESTS = 60
MODEL_LEN = 512

# The ends of each range, as far as a float goes, and something between.
EXTREMES: dict[str, list[Any]] = {
    "max_tokens": [1, 17, 40],
    "min_tokens": [0, 1, 9],
    "temperature": [0.0, 1e-45, 1.0, 100.0],
    "top_p": [1e-45, 0.5, 1.0],
    "top_k": [0, 1, 198, 199, 2**32 - 1],
    "min_p": [0.0, 1e-45, 1.0],
    "seed": [0, 2**63, 2**64 - 1],
    "repetition_penalty": [1e-45, 1.0, 10.0],
    "presence_penalty": [-2.0, 0.0, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2.0],
    "stop": [[], ["x" * 256] * 16, ["\0"], ["\U0001f600"]],
    "stop_token_ids": [[], [0], list(range(135, 199)), [5] * 64],
    "ignore_eos": [False, True],
    "n": [1, 2, 16],
}


def _request(rng: random.Random, adapters: list[str]) -> inference_pb2.GenerateRequest:
    sampling: dict[str, Any] = {name: rng.choice(values) for name, values in EXTREMES.items() if rng.random() < 0.5}
    sampling.setdefault("max_tokens", 12)
    sampling["min_tokens"] = min(sampling.get("min_tokens", 0), sampling["max_tokens"])
    prompt = [rng.randrange(199) for _ in range(rng.choice([1, 16, 200, MODEL_LEN - sampling["max_tokens"]]))]
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        adapter=rng.choice(adapters),
        request_id=rng.choice(["", "~" * 128]),
        priority=rng.choice([-100, 0, 100]),
        ttft_slo=rng.choice([None, duration_pb2.Duration(seconds=315_576_000_000)]),
        sampling=inference_pb2.SamplingParams(**sampling),
        output=inference_pb2.OutputOptions(
            include_stop=rng.random() < 0.5, show_special_tokens=rng.random() < 0.5, at_end=rng.random() < 0.3
        ),
    )
    if rng.random() < 0.5:
        request.logprobs = rng.choice([0, 1, 20])
    return request


def _check(request: inference_pb2.GenerateRequest, answers: "list[Answer]") -> None:
    sampling = request.sampling
    assert len(answers) == (sampling.n or 1)
    for answer in answers:
        assert answer.finished is not None and answer.started is not None
        num_tokens = len(answer.token_ids)
        assert answer.finished.usage.completion_tokens == num_tokens >= 1
        assert answer.finished.usage.prompt_tokens == len(request.token_ids.ids)
        ended_by_length = answer.finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert num_tokens == sampling.max_tokens if ended_by_length else num_tokens >= sampling.min_tokens
        assert len(answer.logprobs) == (num_tokens if request.HasField("logprobs") else 0)
        assert all(len(entry.top) == request.logprobs for entry in answer.logprobs)
        if request.output.at_end:
            assert answer.num_chunks == 1
        if not request.output.include_stop and not sampling.min_tokens:
            assert not any(stop in answer.text for stop in sampling.stop)


def test_every_value_within_its_limits_is_served(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))
    rng = random.Random(5)
    requests = [_request(rng, ["", *model.adapters]) for _ in range(NUM_REQUESTS)]

    async def scenario(service: "Service") -> None:
        await service.register_all()
        all_answers = await asyncio.gather(*(service.stream(request) for request in requests))
        for request, answers in zip(requests, all_answers, strict=True):
            _check(request, answers)

    run_service(model, scenario, num_pages=90, max_num_seqs=24, token_budget=256)
