"""Drives the service through its public gRPC API. Knows nothing of traces or clocks."""

from dataclasses import dataclass

import grpc
from google.protobuf import duration_pb2

from benchmarks.serving.driver import OnTokens, RequestFailedError, Send
from benchmarks.serving.outcome import PlannedRequest, ServerTimings
from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import inference_pb2_grpc as pb_grpc

# A retry would hide an error and count as one long request.
CHANNEL_OPTIONS = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))


@dataclass(frozen=True, slots=True)
class GrpcTarget:
    """A running service. with_text: have text made too, as a user would. slo_s: sent as ttft_slo; None sends none."""

    address: str
    token: str = ""
    timeout_s: float = 600.0
    with_text: bool = False
    slo_s: float | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The credential."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self) -> grpc.aio.Channel:
        """A connection that shares nothing with others."""
        return grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)

    def open(self) -> "GrpcDriver":
        """A driver with a channel of its own."""
        return GrpcDriver(self)


class GrpcDriver:
    """One channel to the service."""

    def __init__(self, target: GrpcTarget) -> None:
        self._target = target
        self._channel = target.channel()
        self._stub = pb_grpc.InferenceServiceStub(self._channel)

    def prepare(self, request: PlannedRequest, prompt_token_ids: list[int]) -> Send:
        """Makes the message."""
        slo_s = self._target.slo_s
        message = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt_token_ids),
            adapter=request.adapter,
            sampling=pb.SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True),
            ttft_slo=None if slo_s is None else duration_pb2.Duration(nanos=int(slo_s % 1 * 1e9), seconds=int(slo_s)),
            output=pb.OutputOptions(token_ids_only=not self._target.with_text),
        )

        async def send(on_tokens: OnTokens) -> ServerTimings | None:
            try:
                return await self._stream(message, on_tokens)
            except grpc.aio.AioRpcError as error:
                raise RequestFailedError(error.code().name, error.details() or "") from error

        return send

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def _stream(self, message: pb.GenerateRequest, on_tokens: OnTokens) -> ServerTimings | None:
        timings = None
        async for response in self._stub.Generate(message, timeout=self._target.timeout_s, metadata=self._target.metadata):
            match response.WhichOneof("event"):
                case "chunk":
                    on_tokens(len(response.chunk.token_ids))
                case "finished":
                    if response.finished.finish_reason == pb.FINISH_REASON_ABORTED:
                        raise RequestFailedError("ABORTED", "the server ended the request while it ran")
                    timings = _timings(response.finished.timings)
        return timings


def _timings(timings: pb.Timings) -> ServerTimings:
    return ServerTimings(
        queue_s=timings.queue_time.ToTimedelta().total_seconds(),
        adapter_wait_s=timings.adapter_wait_time.ToTimedelta().total_seconds(),
        num_preemptions=timings.num_preemptions,
    )
