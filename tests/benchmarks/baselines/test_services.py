"""The whole service with a part replaced says what the real one says: in fp32 on the CPU, where no token depends on the batch."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import grpc
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.baselines.data_plane import parts_of
from benchmarks.baselines.options import Baseline, BaselineOptions
from benchmarks.baselines.slot_ledger import SlotScheduler
from benchmarks.model_shapes import ModelShape, write_config
from controlplane.app import ControlPlane, serve
from controlplane.config import ControlPlaneConfig
from controlplane.dispatch import dispatcher
from dataplane.assembly import load_data_plane
from dataplane.config import DataPlaneConfig, LoadFormat
from dataplane.parts import Parts
from dataplane.service.server import DataPlaneServer
from protos.loraplane.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc

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
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
NUM_ADAPTERS = 6
NUM_SLOTS = 2
# Each slot takes 4 pages, KV gets what is left: not enough for all requests at once.
NUM_PAGES = 20
MAX_TOKENS = 80
TIMEOUT_S = 60.0


@asynccontextmanager
async def service(directory: Path, parts: Parts) -> AsyncIterator[tuple[ControlPlane, grpc.aio.Channel]]:
    """Both planes in this process, and a connection."""
    model_dir = write_config(SHAPE, directory / SHAPE.name, "float32")
    images = directory / "state" / "images"
    images.mkdir(parents=True)
    config = DataPlaneConfig(
        model_dir,
        images,
        (f"unix:{directory}/dp",),
        device="cpu",
        num_pages=NUM_PAGES,
        max_num_seqs=16,
        token_budget=64,
        max_lora_rank=8,
        host_cache_bytes=1 << 24,
        load_format=LoadFormat.DUMMY,
    )
    data_plane = load_data_plane(config, parts=parts)
    server = DataPlaneServer(data_plane, config.listen, config.stop_timeout_s)
    await server.start()
    front = ControlPlaneConfig(
        model_dir=model_dir,
        data_planes=config.listen,
        state_dir=directory / "state",
        listen=(f"unix:{directory}/cp",),
        adapter_roots=(directory,),
    )
    async with serve(front) as control_plane:
        assert await control_plane.dispatcher.wait_connected(TIMEOUT_S)
        async with grpc.aio.insecure_channel(control_plane.address) as channel:
            yield control_plane, channel
    await server.stop()
    data_plane.engine.check_integrity()


async def register_all(channel: grpc.aio.Channel, directory: Path) -> list[str]:
    """Adapters with weights large enough to change what is said, as PEFT saves them."""
    stub = adapter_pb2_grpc.AdapterServiceStub(channel)
    names = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
    for number, name in enumerate(names):
        rank = RANKS[number % len(RANKS)]
        save_adapter(directory / name, rank, seed=number)
        source = adapter_pb2.AdapterSource(path=str(directory / name))
        await stub.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name=name, source=source), timeout=TIMEOUT_S)
    return names


def save_adapter(directory: Path, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = {"k_proj": SHAPE.num_kv_heads * SHAPE.head_dim, "v_proj": SHAPE.num_kv_heads * SHAPE.head_dim}
    tensors = {}
    for layer in range(SHAPE.num_layers):
        for module in MODULES:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, SHAPE.hidden_size, generator=generator)
            out_features = widths.get(module, SHAPE.hidden_size)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(MODULES), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


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


def answers_of(directory: Path, parts: Parts) -> Answers:
    """What a service of these parts says."""

    async def run() -> Answers:
        async with service(directory, parts) as (control_plane, channel):
            token_ids = await answer_all(channel, await register_all(channel, directory))
            (load,) = control_plane.dispatcher.load().data_planes
            return Answers(token_ids, load.num_preemptions)

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
    options = BaselineOptions(Baseline.NO_UNIFY, NUM_SLOTS, MODULES, ())
    with patch.object(dispatcher, "Scheduler", partial(SlotScheduler, NUM_SLOTS)):
        answers = answers_of(tmp_path, parts_of(options))
    assert answers.token_ids == expected
    assert answers.num_preemptions, "there were pages enough for everybody"
