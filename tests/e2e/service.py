"""The whole service as a client sees it, with the engines at hand. Does not know how it was started."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from controlplane.app import ControlPlane
from protos.loraplane.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc, system_pb2_grpc
from tests.e2e.data_plane import RunningDataPlane
from tests.e2e.models import Prompt, TinyModel
from tests.waiting import until

# No call of these tests takes this long; one that hangs must fail and not stop the suite.
RPC_TIMEOUT_S = 120.0


@dataclass
class Answer:
    """Everything one choice of a request was told."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    started: inference_pb2.Started | None = None
    finished: inference_pb2.Finished | None = None
    num_chunks: int = 0


class Service:
    """Both planes in this process, as a client sees them and with the engines at hand."""

    def __init__(
        self,
        control_plane: ControlPlane,
        data_planes: Sequence[RunningDataPlane],
        channel: grpc.aio.Channel,
        model: TinyModel,
        store_dir: Path,
    ) -> None:
        self.control_plane = control_plane
        self.data_planes = data_planes
        self.model = model
        self.store_dir = store_dir
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self.system = system_pb2_grpc.SystemServiceStub(channel)

    async def register(self, name: str, path: Path) -> adapter_pb2.Adapter:
        """Registers a PEFT directory under a name."""
        request = adapter_pb2.RegisterAdapterRequest(name=name, source=adapter_pb2.AdapterSource(path=str(path)))
        response = await self.adapters.RegisterAdapter(request, timeout=RPC_TIMEOUT_S)
        return response.adapter

    async def register_all(self) -> list[adapter_pb2.Adapter]:
        """Registers every adapter of the model."""
        return [await self.register(name, path) for name, path in self.model.adapters.items()]

    async def stream(self, request: inference_pb2.GenerateRequest, timeout_s: float = RPC_TIMEOUT_S) -> list[Answer]:
        """Reads a stream to its end: one answer per choice."""
        answers: dict[int, Answer] = {}
        started = None
        async for response in self.inference.Generate(request, timeout=timeout_s):
            match response.WhichOneof("event"):
                case "started":
                    started = response.started
                case "chunk":
                    answer = answers.setdefault(response.chunk.choice_index, Answer())
                    assert answer.finished is None, "a chunk came after its choice had finished"
                    answer.token_ids += response.chunk.token_ids
                    answer.text += response.chunk.text
                    answer.logprobs += response.chunk.logprobs
                    answer.num_chunks += 1
                case "finished":
                    answers.setdefault(response.finished.choice_index, Answer()).finished = response.finished
        for answer in answers.values():
            answer.started = started
        return [answers[i] for i in sorted(answers)]

    async def generate_choices(self, adapter: str, token_ids: Sequence[int], **sampling: Any) -> list[Answer]:
        """All choices from a prompt of token ids, greedy unless told otherwise."""
        return await self.stream(self.request(adapter, token_ids, **sampling))

    async def generate(self, adapter: str, token_ids: Sequence[int], **sampling: Any) -> Answer:
        """The only choice."""
        (answer,) = await self.generate_choices(adapter, token_ids, **sampling)
        return answer

    @staticmethod
    def request(adapter: str, token_ids: Sequence[int], **sampling: Any) -> inference_pb2.GenerateRequest:
        """A prompt of token ids, greedy unless told otherwise."""
        sampling.setdefault("temperature", 0.0)
        return inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=token_ids),
            adapter=adapter,
            sampling=inference_pb2.SamplingParams(**sampling),
        )

    async def generate_all(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Answer]:
        """All prompts at once, so that they share a batch."""
        return await self.generate_each([(prompt, sampling) for prompt in prompts])

    async def generate_each(self, requests: Sequence[tuple[Prompt, dict[str, Any]]]) -> list[Answer]:
        """All requests at once, each with sampling of its own."""
        calls = (self.generate(adapter, ids, **sampling) for (adapter, ids), sampling in requests)
        return list(await asyncio.gather(*calls))

    def num_preemptions(self) -> int:
        """How often a request was preempted so far."""
        return sum(plane.num_preemptions for plane in self.control_plane.dispatcher.load().data_planes)

    def kv_pages(self) -> int:
        """Pages that hold KV, all data planes, as of the latest reports."""
        return sum(plane.pool.kv_pages for plane in self.control_plane.dispatcher.load().data_planes)

    async def wait_idle(self) -> None:
        """Waits until nothing runs and no page holds KV."""
        dispatcher = self.control_plane.dispatcher
        await until(lambda: not dispatcher.load().num_running and not dispatcher.load().num_waiting and not self.kv_pages())
