"""The same request gives the same tokens: alone, in any batch, with any chunking, after preemption; greedy or seeded."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Prompt, Service, TinyModel

MAX_TOKENS = 40

# Named for what each of them changes about how a request is computed; none of them may change what it answers.
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "whole prompts": {"token_budget": 2048, "num_pages": 512},
    "chunks of a few tokens": {"token_budget": 17, "max_num_seqs": 16, "num_pages": 512},
    "a step ahead": {"token_budget": 64, "num_pages": 512, "runs_ahead": True},
    "a step ahead, preempted and evicted": {"token_budget": 64, "max_num_seqs": 32, "num_pages": 34, "runs_ahead": True},
    "preempted and evicted": {"token_budget": 64, "max_num_seqs": 32, "num_pages": 34},
}

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.4},
]


def _requests(model: "TinyModel") -> "list[tuple[Prompt, dict[str, Any]]]":
    rng = random.Random(11)
    requests = []
    for number in range(30):
        adapter = rng.choice(["", *model.adapters])
        prompt = tuple(rng.randrange(3, 199) for _ in range(rng.randrange(1, 60)))
        options = {**SAMPLING[number % len(SAMPLING)], "seed": number // 2, "max_tokens": MAX_TOKENS, "ignore_eos": True}
        requests.append(((adapter, prompt), options))
    return requests


def test_a_request_answers_the_same_alone_and_in_any_surroundings(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))
    requests = _requests(model)
    alone: list[list[int]] = []

    async def one_by_one(service: "Service") -> None:
        await service.register_all()
        for (adapter, prompt), options in requests:
            alone.append((await service.generate(adapter, prompt, **options)).token_ids)

    run_service(model, one_by_one)
    assert all(len(tokens) == MAX_TOKENS for tokens in alone)

    for name, options in SURROUNDINGS.items():

        async def all_at_once(service: "Service", name: str = name) -> None:
            together = await service.generate_each(requests)
            assert [answer.token_ids for answer in together] == alone, name
            assert (service.num_preemptions() > 0) == ("preempted" in name)

        run_service(model, all_at_once, **options)


def test_the_seed_decides_and_choices_of_one_request_differ(
    build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))

    async def scenario(service: "Service") -> None:
        async def choices(seed: int) -> list[list[int]]:
            answers = await service.generate_choices("", (5, 6, 7), temperature=1.0, seed=seed, n=3, max_tokens=12)
            return [answer.token_ids for answer in answers]

        first, again, other = await choices(1), await choices(1), await choices(2)
        assert first == again
        assert len({tuple(tokens) for tokens in first + other}) == 6
        alone = await service.generate("", (5, 6, 7), temperature=1.0, seed=1, max_tokens=12)
        assert alone.token_ids == first[0], "choice 0 uses the seed itself"

    run_service(model, scenario)


@pytest.mark.parametrize("num_data_planes", [2])
def test_several_data_planes_answer_alike(
    num_data_planes: int, build_model: "Callable[..., TinyModel]", run_service: Callable[..., None]
) -> None:
    model = build_model("llama", (2, 8, 12, 16))
    requests = _requests(model)
    answers: list[list[list[int]]] = []

    async def scenario(service: "Service") -> None:
        if not answers:
            await service.register_all()
        answers.append([answer.token_ids for answer in await service.generate_each(requests)])
        if len(service.data_planes) > 1:
            steps = [plane.num_steps for plane in service.control_plane.dispatcher.load().data_planes]
            assert all(steps), f"a data plane had nothing to do: {steps}"

    run_service(model, scenario)
    run_service(model, scenario, num_data_planes=num_data_planes, max_num_seqs=8)
    assert answers[0] == answers[1]
