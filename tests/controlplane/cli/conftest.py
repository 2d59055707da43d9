"""A service for the command line to talk to: the public contract over real gRPC, with answers that a test can foresee."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from controlplane.cli.main import main
from protos.loraplane.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)

WORDS = ("Once", " upon", " a", " time")


def fail(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, *details: Message) -> NoReturn:
    """Ends a call as the service does: a status with google.rpc details."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    context.abort_with_status(rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed)))
    raise AssertionError("abort raises")


@dataclass
class PublicService(
    inference_pb2_grpc.InferenceServiceServicer,
    adapter_pb2_grpc.AdapterServiceServicer,
    system_pb2_grpc.SystemServiceServicer,
):
    """Keeps adapters in a dict, speaks four words, and remembers what it was asked."""

    adapters: dict[str, adapter_pb2.Adapter] = field(default_factory=dict)
    uploads: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[object] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.tokens += [str(value) for key, value in context.invocation_metadata() if key == "authorization"]
        if request.adapter and request.adapter not in self.adapters:
            fail(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no adapter is called {request.adapter!r}",
                error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND", domain="loraplane"),
                error_details_pb2.ResourceInfo(resource_type="adapter", resource_name=request.adapter),
            )
        if request.sampling.temperature > 100:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field="sampling.temperature", description=f"is {request.sampling.temperature:g}; at most 100"
            )
            fail(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "the request has 1 bad field",
                error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="loraplane"),
                error_details_pb2.BadRequest(field_violations=[violation]),
            )
        if request.priority < 0:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(1500)
            fail(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "1000 requests wait already; the limit is 1000",
                error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="loraplane"),
                retry,
            )
        yield inference_pb2.GenerateResponse(started=inference_pb2.Started(request_id="r-1", prompt_tokens=3))
        num_choices = request.sampling.n or 1
        for number, word in enumerate(WORDS):
            for choice in range(num_choices):
                chunk = inference_pb2.Chunk(choice_index=choice, token_ids=[number + 5], text=word)
                if request.HasField("logprobs"):
                    top = inference_pb2.TopLogprob(token_id=9, logprob=-0.5, text="[alt]")
                    chunk.logprobs.add(logprob=-0.25, top=[top])
                yield inference_pb2.GenerateResponse(chunk=chunk)
        for choice in range(num_choices):
            finished = inference_pb2.Finished(
                choice_index=choice,
                finish_reason=inference_pb2.FINISH_REASON_STOP,
                matched_stop="The End",
                usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=len(WORDS)),
            )
            finished.timings.time_to_first_token.FromMilliseconds(20)
            finished.timings.total_time.FromMilliseconds(50)
            yield inference_pb2.GenerateResponse(finished=finished)

    def UploadAdapter(
        self, request_iterator: Iterator[adapter_pb2.UploadAdapterRequest], context: grpc.ServicerContext
    ) -> adapter_pb2.UploadAdapterResponse:
        files: dict[str, bytes] = {}
        headers: list[adapter_pb2.FileHeader] = []
        for request in request_iterator:
            if request.WhichOneof("part") == "file":
                headers.append(request.file)
                files[request.file.name] = b""
            else:
                assert len(request.chunk) <= 4 * 1024 * 1024
                files[headers[-1].name] += request.chunk
        for header in headers:
            assert len(files[header.name]) == header.size_bytes
            assert hashlib.sha256(files[header.name]).hexdigest() == header.sha256
        upload_id = f"upload-{len(self.uploads)}"
        self.uploads[upload_id] = files
        return adapter_pb2.UploadAdapterResponse(upload_id=upload_id)

    def RegisterAdapter(
        self, request: adapter_pb2.RegisterAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.RegisterAdapterResponse:
        self.requests.append(request)
        if request.source.WhichOneof("source") == "path":
            violation = error_details_pb2.PreconditionFailure.Violation(
                type="RANK", subject="lora_A.rank", description="rank 128 is over the limit of 64"
            )
            fail(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "the base model cannot take this adapter",
                error_details_pb2.ErrorInfo(reason="ADAPTER_REJECTED", domain="loraplane"),
                error_details_pb2.PreconditionFailure(violations=[violation]),
            )
        version = adapter_pb2.AdapterVersion(
            version=hashlib.sha256(request.name.encode()).hexdigest(),
            rank=8,
            alpha=16,
            target_modules=["q_proj", "v_proj"],
            num_pages=3,
            size_bytes=3 * 1024 * 1024,
        )
        adapter = adapter_pb2.Adapter(
            name=request.name,
            current=version,
            versions=[version],
            aliases=dict.fromkeys(request.aliases, version.version),
            labels=request.labels,
            pinned=request.pinned,
            state=adapter_pb2.ADAPTER_STATE_REGISTERED,
            etag="1",
        )
        if not request.validate_only:
            self.adapters[request.name] = adapter
        return adapter_pb2.RegisterAdapterResponse(adapter=adapter)

    def _find(self, name: str, context: grpc.ServicerContext) -> adapter_pb2.Adapter:
        if name not in self.adapters:
            fail(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no adapter is called {name!r}",
                error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND", domain="loraplane"),
            )
        return self.adapters[name]

    def GetAdapter(self, request: adapter_pb2.GetAdapterRequest, context: grpc.ServicerContext) -> adapter_pb2.GetAdapterResponse:
        return adapter_pb2.GetAdapterResponse(adapter=self._find(request.name, context))

    def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.ListAdaptersResponse:
        self.requests.append(request)
        names = sorted(self.adapters)
        begin = int(request.page_token or 0)
        # Pages of two, however many were asked for: a server may always send fewer.
        end = begin + min(2, request.page_size)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in names[begin:end]],
            next_page_token=str(end) if end < len(names) else "",
            total_size=len(names),
            revision="7",
        )

    def UpdateAdapter(
        self, request: adapter_pb2.UpdateAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.UpdateAdapterResponse:
        self.requests.append(request)
        return adapter_pb2.UpdateAdapterResponse(adapter=self._find(request.name, context))

    def UnregisterAdapter(
        self, request: adapter_pb2.UnregisterAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.UnregisterAdapterResponse:
        self.requests.append(request)
        adapter = self._find(request.name, context)
        del self.adapters[request.name]
        return adapter_pb2.UnregisterAdapterResponse(adapter=adapter)

    def PinAdapter(self, request: adapter_pb2.PinAdapterRequest, context: grpc.ServicerContext) -> adapter_pb2.PinAdapterResponse:
        self._find(request.name, context).pinned = True
        return adapter_pb2.PinAdapterResponse(adapter=self._find(request.name, context))

    def UnpinAdapter(
        self, request: adapter_pb2.UnpinAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.UnpinAdapterResponse:
        self._find(request.name, context).pinned = False
        return adapter_pb2.UnpinAdapterResponse(adapter=self._find(request.name, context))

    def PreloadAdapter(
        self, request: adapter_pb2.PreloadAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.PreloadAdapterResponse:
        return adapter_pb2.PreloadAdapterResponse(adapter=self._find(request.name, context))

    def WatchAdapters(
        self, request: adapter_pb2.WatchAdaptersRequest, context: grpc.ServicerContext
    ) -> Iterator[adapter_pb2.WatchAdaptersResponse]:
        for number, adapter in enumerate(self.adapters.values()):
            yield adapter_pb2.WatchAdaptersResponse(type=adapter_pb2.CHANGE_TYPE_ADDED, adapter=adapter, revision=str(number))

    def GetServerInfo(
        self, request: system_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> system_pb2.GetServerInfoResponse:
        plane = system_pb2.DataPlaneInfo(
            address="unix:/dp-0", device="CPU", dtype="float32", page_tokens=16, page_bytes=65536, num_pages=100
        )
        return system_pb2.GetServerInfoResponse(
            version="0.1.0",
            base_model="tiny",
            architecture="LlamaForCausalLM",
            limits=system_pb2.Limits(max_waiting=1000),
            data_planes=[plane],
        )

    def GetLoad(self, request: system_pb2.GetLoadRequest, context: grpc.ServicerContext) -> system_pb2.GetLoadResponse:
        pool = system_pb2.PoolUsage(num_pages=100, kv_pages=25, adapter_pages=15, idle_adapter_pages=5, free_pages=60)
        plane = system_pb2.DataPlaneLoad(
            address="unix:/dp-0",
            connected=True,
            num_running=4,
            pool=pool,
            adapters=[
                system_pb2.ResidentAdapter(names=["pirate"], version="ab" * 32, num_pages=10, num_requests=3),
                system_pb2.ResidentAdapter(version="cd" * 32, num_pages=5),
            ],
            num_steps=12,
        )
        away = system_pb2.DataPlaneLoad(address="unix:/dp-1", connected=False)
        return system_pb2.GetLoadResponse(num_waiting=2, num_running=4, data_planes=[plane, away], output_tokens_per_s=123.4)

    def Drain(self, request: system_pb2.DrainRequest, context: grpc.ServicerContext) -> system_pb2.DrainResponse:
        return system_pb2.DrainResponse()


@dataclass(frozen=True)
class RunningService:
    """The service, where it listens, and its health."""

    address: str
    service: PublicService
    health: health.HealthServicer


@pytest.fixture
def running() -> Iterator[RunningService]:
    """A fresh service on a port of its own."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    service, health_service = PublicService(), health.HealthServicer()
    health_service.set("", health_pb2.HealthCheckResponse.SERVING)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(service, server)
    system_pb2_grpc.add_SystemServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield RunningService(f"127.0.0.1:{port}", service, health_service)
    server.stop(None).wait()


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    exit_code: int
    out: str
    err: str


@pytest.fixture
def cli(running: RunningService, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """cli("status", "--json") runs a command against the service."""

    def run(*argv: str, environment: dict[str, str] | None = None) -> Result:
        exit_code = main(argv, {"LORAPLANE_SERVER": running.address, **(environment or {})})
        captured = capsys.readouterr()
        return Result(exit_code, captured.out, captured.err)

    return run
