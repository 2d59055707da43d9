"""The whole service with a part replaced says what the real one says: in fp32 on the CPU, where no token depends on the batch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest

from adapter_store.geometry import LORA_MODULES
from benchmarks.baselines.data_plane import parts_of
from benchmarks.baselines.options import Baseline, BaselineOptions
from benchmarks.baselines.slot_ledger import SlotScheduler
from benchmarks.model_shapes import ModelShape
from benchmarks.soak.adapters import register_random
from benchmarks.soak.service import PlaneOptions, serve_both
from controlplane.scheduling import MakeScheduler, Scheduler
from dataplane.parts import Parts
from protos.loraplane.v1 import inference_pb2, inference_pb2_grpc

SHAPE = ModelShape(
    "tiny",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=96,
    max_model_len=256,
)
RANKS = (8, 1, 4)
NUM_ADAPTERS = 6
NUM_SLOTS = 2
# Each slot takes 8 pages, KV gets what is left: not enough for all requests at once.
NUM_PAGES = 28
MAX_TOKENS = 80
TIMEOUT_S = 60.0


async def answer_all(channel: grpc.aio.Channel, adapters: Sequence[str]) -> list[list[int]]:
    """The tokens of requests that are sent at once, two for each adapter and for the base."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def answer(adapter: str, prompt: Sequence[int]) -> list[int]:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            adapter=adapter,
            sampling=inference_pb2.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True),
        )
        responses = [response async for response in stub.Generate(request, timeout=TIMEOUT_S)]
        return [token for response in responses for token in response.chunk.token_ids]

    prompts = [range(3, 8), range(20, 60)]
    return list(await asyncio.gather(*(answer(adapter, prompt) for prompt in prompts for adapter in ("", *adapters))))


@dataclass(frozen=True)
class Answers:
    """What a service said, and how often it preempted a request before that."""

    token_ids: list[list[int]]
    num_preemptions: int


def answers_of(directory: Path, parts: Parts, make_scheduler: MakeScheduler = Scheduler) -> Answers:
    """What a service of these parts says."""
    options = PlaneOptions(
        "cpu", "float32", NUM_PAGES, 16, token_budget=64, max_lora_rank=8, parts=parts, make_scheduler=make_scheduler
    )

    async def run() -> Answers:
        async with serve_both(directory, SHAPE, options) as running:
            names = await register_random(running.channel, directory, SHAPE, [RANKS[i % len(RANKS)] for i in range(NUM_ADAPTERS)])
            token_ids = await answer_all(running.channel, names)
            return Answers(token_ids, running.load().num_preemptions)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What the real service says."""
    answers = answers_of(tmp_path_factory.mktemp("real"), Parts()).token_ids
    assert all(len(token_ids) == MAX_TOKENS for token_ids in answers)
    assert len({tuple(token_ids) for token_ids in answers}) > NUM_ADAPTERS, "adapters hardly change what is said"
    return answers


def test_padded_bmm_says_the_same(expected: list[list[int]], tmp_path: Path) -> None:
    options = BaselineOptions(Baseline.BMM, 0, (), ())
    assert answers_of(tmp_path, parts_of(options)).token_ids == expected


def test_fixed_slots_say_the_same_though_slots_and_pages_are_few(expected: list[list[int]], tmp_path: Path) -> None:
    options = BaselineOptions(Baseline.NO_UNIFY, NUM_SLOTS, LORA_MODULES, ())
    answers = answers_of(tmp_path, parts_of(options), partial(SlotScheduler, NUM_SLOTS))
    assert answers.token_ids == expected
    assert answers.num_preemptions, "there were pages enough for everybody"
