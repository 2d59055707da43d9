"""A data plane over gRPC on a Unix socket as a control plane sees it, and what transformers and peft say it must answer."""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from google.rpc import error_details_pb2, status_pb2
from peft import PeftModel
from transformers import LlamaForCausalLM

from dataplane.assembly import load_data_plane
from dataplane.config import DataPlaneConfig
from dataplane.service.server import DataPlaneServer
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import (
    AdmittedRequest,
    BatchUpdate,
    EngineSampling,
    Hello,
    StepReport,
    hello_to_proto,
    reports_from_proto,
    update_to_proto,
)

VOCAB = 151


TIMEOUT_S = 60


@dataclass(frozen=True)
class Served:
    """A model directory, a store with adapters of it, and what transformers and peft say they answer."""

    config: DataPlaneConfig
    digests: dict[str, str]
    adapter_dirs: dict[str, Path]

    def expected(self, adapter: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy output of the reference."""
        model = LlamaForCausalLM.from_pretrained(self.config.model_dir).eval()
        if adapter:
            model = PeftModel.from_pretrained(model, self.adapter_dirs[adapter]).eval()
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
        )
        return out[0, len(prompt) :].tolist()


@dataclass
class Control:
    """A control plane in miniature: one session on a channel."""

    call: Any
    first: StepReport
    reports: list[StepReport] = field(default_factory=list)
    unread: list[StepReport] = field(default_factory=list)
    _sequence: Any = field(default_factory=lambda: itertools.count(1))

    @classmethod
    async def open(cls, channel: grpc.aio.Channel) -> "Control":
        stub = pb_grpc.DataPlaneServiceStub(channel)
        described = await stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
        call: Any = stub.Run(timeout=TIMEOUT_S)
        await call.write(hello_to_proto(Hello("test", described.epoch)))
        first, *more = reports_from_proto(await call.read())
        return cls(call, first, unread=more)

    async def update(self, **changes: Any) -> None:
        await self.call.write(update_to_proto(BatchUpdate(next(self._sequence), **changes)))

    async def read(self) -> StepReport:
        if not self.unread:
            self.unread += reports_from_proto(await self.call.read())
        report = self.unread.pop(0)
        self.reports.append(report)
        return report

    async def read_until_finished(self, num_requests: int) -> dict[int, list[int]]:
        """Tokens by request, once that many have finished."""
        tokens: dict[int, list[int]] = {}
        num_finished = 0
        while num_finished < num_requests:
            report = await self.read()
            num_finished += len(report.finished)
            for key, token_id in zip(report.request_keys, report.token_ids, strict=True):
                tokens.setdefault(key, []).append(token_id)
        return tokens


@asynccontextmanager
async def serving(config: DataPlaneConfig) -> AsyncIterator[grpc.aio.Channel]:
    """A running data plane, whose books must add up when it is stopped."""
    data_plane = load_data_plane(config)
    server = DataPlaneServer(data_plane, config.listen, config.stop_timeout_s)
    (address,) = await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel
    finally:
        await server.stop()
        data_plane.engine.check_integrity()


def admitted(key: int, prompt: Sequence[int], max_tokens: int, digest: str = "", **sampling: Any) -> AdmittedRequest:
    """A request as the control plane admits it; unless told otherwise it runs to max_tokens."""
    params = EngineSampling(max_tokens=max_tokens, **{"ignore_eos": True, **sampling})
    return AdmittedRequest(key, f"r{key}", tuple(prompt), 0, digest, params)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The ErrorInfo reason of a status."""
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert isinstance(details, bytes)
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert info.domain == "loraplane"
    return info.reason
