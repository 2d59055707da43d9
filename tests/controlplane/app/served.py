"""A control plane in process, as a client sees it: embedded Redis, and a data plane that speaks the real protocol."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from tokenizers import pre_tokenizers

from benchmarks import null_data_plane
from benchmarks.null_data_plane import NullDataPlane
from benchmarks.null_engine import NullConfig, null_tokens
from controlplane.app import ControlPlane, serve
from controlplane.config import ControlPlaneConfig
from controlplane.services.rpc_status import DETAILS_KEY
from protos.loraplane.v1 import adapter_pb2_grpc, inference_pb2_grpc, system_pb2_grpc
from protos.loraplane.v1 import inference_pb2 as pb
from tests.waiting import until

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB_SIZE = len(ALPHABET) + 1
EOS = len(ALPHABET)
NULL = NullConfig(num_pages=64, vocab_size=VOCAB_SIZE, max_model_len=256)
TIMEOUT_S = 30.0


class Answer:
    """A stream, taken apart by choice."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.started = pb.Started()
        self.token_ids: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.logprobs: dict[int, list[pb.TokenLogprobs]] = {}
        self.finished: dict[int, pb.Finished] = {}

    def take(self, response: pb.GenerateResponse) -> None:
        """The next message of the stream."""
        kind = response.WhichOneof("event")
        assert kind is not None
        self.events.append(kind)
        if kind == "started":
            self.started = response.started
        elif kind == "chunk":
            chunk = response.chunk
            assert chunk.choice_index not in self.finished, f"choice {chunk.choice_index} had finished"
            self.token_ids.setdefault(chunk.choice_index, []).extend(chunk.token_ids)
            self.text[chunk.choice_index] = self.text.get(chunk.choice_index, "") + chunk.text
            self.logprobs.setdefault(chunk.choice_index, []).extend(chunk.logprobs)
        else:
            self.finished[response.finished.choice_index] = response.finished


@dataclass
class Client:
    """Stubs to a running control plane, and the plane itself."""

    app: ControlPlane
    null: NullDataPlane
    channel: grpc.aio.Channel
    tokenizer: tokenizers.Tokenizer

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def system(self) -> Any:
        return system_pb2_grpc.SystemServiceStub(self.channel)

    @property
    def adapters(self) -> Any:
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)

    async def generate(self, timeout: float = TIMEOUT_S, **fields: Any) -> Answer:
        """The answer to a request of these fields."""
        answer = Answer()
        async for response in self.inference.Generate(pb.GenerateRequest(**fields), timeout=timeout):
            answer.take(response)
        return answer

    def expected(self, prompt: str, seed: int, count: int, digest: str = "") -> list[int]:
        """What the data plane answers to it."""
        return null_tokens(seed, digest, self.tokenizer.encode(prompt).ids, count, VOCAB_SIZE)

    async def idle(self) -> None:
        """Returns once nothing runs and every KV page is free again."""
        await until(lambda: not self.null.engine.standing and not self.null.engine.counts.kv_pages)


@asynccontextmanager
async def running(tmp_path: Path, model_dir: Path, null: NullConfig = NULL, **options: Any) -> AsyncIterator[Client]:
    """Serves until the block ends. options: of the control plane."""
    address = f"unix:{tmp_path}/dp.sock"
    config = ControlPlaneConfig(model_dir, (address,), tmp_path / "state", ("127.0.0.1:0",), **options)
    async with null_data_plane.serve(address, null) as data_plane, serve(config) as app:
        assert await app.dispatcher.wait_connected(TIMEOUT_S)
        async with grpc.aio.insecure_channel(app.address) as channel:
            yield Client(app, data_plane, channel, tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json")))


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """The status and details of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    found: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            assert isinstance(value, bytes)
            for packed in status_pb2.Status.FromString(value).details:
                name = packed.TypeName().rpartition(".")[2]
                found[name] = getattr(error_details_pb2, name)()
                packed.Unpack(found[name])
    return error.code(), error.details() or "", found


def sampling(**fields: Any) -> pb.SamplingParams:
    """Sampling with these fields set."""
    return pb.SamplingParams(**fields)
