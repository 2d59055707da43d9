"""A data plane that computes nothing but speaks the real protocol, for benchmarks and tests of the control plane.

Serves a NullEngine over gRPC: `python -m benchmarks.null_data_plane --listen ADDRESS`.
"""

import argparse
import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

import grpc

from benchmarks.null_engine import NullConfig, NullEngine
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import BatchUpdate, Hello, StepReport, report_to_proto, run_request_from_proto


class NullDataPlane(pb_grpc.DataPlaneServiceServicer):
    """Serves one NullEngine. Everything runs on the event loop."""

    def __init__(self, config: NullConfig, epoch: int | None = None) -> None:
        self.engine = NullEngine(config, time.time_ns() if epoch is None else epoch)
        self.num_sessions = 0
        self._news = asyncio.Event()
        self._session = ""

    def describe(self) -> pb.DescribeResponse:
        """What it says of itself."""
        config, geometry = self.engine.config, self.engine.config.geometry
        return pb.DescribeResponse(
            epoch=self.engine.epoch,
            version="null",
            model=pb.ModelDescription(
                name=geometry.model_name,
                fingerprint=geometry.fingerprint,
                architecture="Null",
                vocab_size=config.vocab_size,
                eos_token_ids=config.eos_token_ids,
                num_layers=geometry.num_layers,
                num_kv_heads=geometry.num_kv_heads,
                head_dim=geometry.head_dim,
                dtype=geometry.dtype,
                modules=[
                    pb.LinearModule(name=m.name, in_features=m.in_features, out_features=m.out_features) for m in geometry.modules
                ],
            ),
            pool=pb.PoolDescription(num_pages=config.num_pages, page_tokens=geometry.page_tokens, page_elems=geometry.page_elems),
            device="none",
            max_num_seqs=config.max_num_seqs,
            token_budget=config.token_budget,
            max_model_len=config.max_model_len,
            max_lora_rank=geometry.max_lora_rank,
        )

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[pb.DescribeRequest, pb.DescribeResponse]
    ) -> pb.DescribeResponse:
        return self.describe()

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunResponse]
    ) -> AsyncIterator[pb.RunResponse]:
        hello = run_request_from_proto(await anext(request_iterator))
        if not isinstance(hello, Hello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION: hello must come first")
        if hello.epoch != self.engine.epoch:
            message = f"EPOCH_MISMATCH: this is epoch {self.engine.epoch}, hello names {hello.epoch}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
        self._session = hello.session_id
        self.num_sessions += 1
        self._news.set()
        yield report_to_proto(self.engine.open_session())
        updates: deque[BatchUpdate] = deque()
        reader = asyncio.create_task(self._read(request_iterator, updates))
        try:
            while self._session == hello.session_id and not reader.done():
                report = self._turn(updates)
                if report is None:
                    self._news.clear()
                    await self._news.wait()
                    continue
                yield report_to_proto(report)
                await asyncio.sleep(self.engine.config.step_s)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        if self._session != hello.session_id:
            await context.abort(grpc.StatusCode.ABORTED, "SESSION_TAKEN_OVER")
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION: the stream of updates ended or has a gap")

    def _turn(self, updates: deque[BatchUpdate]) -> StepReport | None:
        while updates:
            self.engine.apply(updates.popleft())
        return self.engine.step()

    async def _read(self, request_iterator: AsyncIterator[pb.RunRequest], updates: deque[BatchUpdate]) -> None:
        expected = 1
        try:
            async for message in request_iterator:
                update = run_request_from_proto(message)
                if not isinstance(update, BatchUpdate) or update.sequence != expected:
                    return
                expected += 1
                updates.append(update)
                self._news.set()
        finally:
            self._news.set()


@contextlib.asynccontextmanager
async def serve(listen: str, config: NullConfig, epoch: int | None = None) -> AsyncIterator[NullDataPlane]:
    """Serves while the context is open."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", 16 << 20),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )
    data_plane = NullDataPlane(config, epoch)
    pb_grpc.add_DataPlaneServiceServicer_to_server(data_plane, server)
    server.add_insecure_port(listen)
    await server.start()
    try:
        yield data_plane
    finally:
        await server.stop(grace=None)


async def _serve_forever(listen: str, config: NullConfig) -> None:
    async with serve(listen, config):
        print("ready", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Command line."""
    defaults = NullConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True, help="host:port or unix:PATH")
    parser.add_argument("--step-ms", type=float, default=0.0, help="milliseconds that a step takes")
    parser.add_argument("--num-pages", type=int, default=defaults.num_pages)
    parser.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs)
    args = parser.parse_args()
    config = NullConfig(num_pages=args.num_pages, max_num_seqs=args.max_num_seqs, step_s=args.step_ms / 1000)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve_forever(args.listen, config))


if __name__ == "__main__":
    main()
