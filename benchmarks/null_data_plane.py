"""A data plane that computes nothing but speaks the real protocol, for benchmarks and tests of the control plane.

Serves a NullEngine over gRPC: `python -m benchmarks.null_data_plane --listen ADDRESS`. It takes the seat of `python -m dataplane`
where a benchmark starts a service.
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc

from benchmarks.model_shapes import SHAPES, geometry_of
from benchmarks.null_engine import NullConfig, NullEngine
from benchmarks.options import make_parser
from benchmarks.streaming.clock_engine import ClockEngine, StampEngine
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import BatchUpdate, Hello, StepReport, reports_to_proto, run_request_from_proto

# As the real data plane: the engine pauses when so many reports wait.
MAX_WAITING_REPORTS = 64

_ENGINES: dict[str, Callable[[NullConfig, int], NullEngine]] = {
    "null": NullEngine,
    "clock": ClockEngine,
    "stamps": StampEngine,
}


class NullDataPlane(pb_grpc.DataPlaneServiceServicer):
    """Serves one NullEngine, or an engine in its seat. Everything runs on the event loop."""

    def __init__(
        self, config: NullConfig, epoch: int | None = None, engine_type: Callable[[NullConfig, int], NullEngine] = NullEngine
    ) -> None:
        self.engine = engine_type(config, time.time_ns() if epoch is None else epoch)
        self.num_sessions = 0
        self._news = asyncio.Event()  # for the engine: an update, or room for a report
        self._made = asyncio.Event()  # for the stream: a report, or the end
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
        self._made.set()
        updates: deque[BatchUpdate] = deque()
        reports = deque([self.engine.open_session()])
        reader = asyncio.create_task(self._read(request_iterator, updates))
        stepper = asyncio.create_task(self._step(hello.session_id, updates, reports))
        try:
            while self._session == hello.session_id and not reader.done():
                if reports:
                    batch = [reports.popleft() for _ in range(len(reports))]
                    self._news.set()
                    yield reports_to_proto(batch)
                else:
                    self._made.clear()
                    await self._made.wait()
        finally:
            reader.cancel()
            stepper.cancel()
            await asyncio.gather(reader, stepper, return_exceptions=True)
        if self._session != hello.session_id:
            await context.abort(grpc.StatusCode.ABORTED, "SESSION_TAKEN_OVER")
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION: the stream of updates ended or has a gap")

    async def _step(self, session_id: str, updates: deque[BatchUpdate], reports: deque[StepReport]) -> None:
        """Steps at its pace, ahead of what is read by no more than the real engine would be."""
        due = time.monotonic()
        while self._session == session_id:
            report = self._turn(updates) if len(reports) < MAX_WAITING_REPORTS else None
            if report is None:
                self._news.clear()
                await self._news.wait()
                due = time.monotonic()
                continue
            reports.append(report)
            self._made.set()
            due += self.engine.config.step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))

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
            self._made.set()


@contextlib.asynccontextmanager
async def serve(
    listen: str,
    config: NullConfig,
    epoch: int | None = None,
    engine_type: Callable[[NullConfig, int], NullEngine] = NullEngine,
) -> AsyncIterator[NullDataPlane]:
    """Serves while the context is open."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", 16 << 20),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )
    data_plane = NullDataPlane(config, epoch, engine_type)
    pb_grpc.add_DataPlaneServiceServicer_to_server(data_plane, server)
    server.add_insecure_port(listen)
    await server.start()
    try:
        yield data_plane
    finally:
        await server.stop(grace=None)


async def _serve_forever(listen: str, config: NullConfig, engine_type: Callable[[NullConfig, int], NullEngine]) -> None:
    async with serve(listen, config, engine_type=engine_type):
        print(json.dumps({"event": "ready", "listen": listen}), flush=True)  # as the real one
        await asyncio.Event().wait()


def main() -> None:
    """Command line."""
    defaults = NullConfig()
    parser = make_parser("benchmarks.null_data_plane", __doc__)
    parser.add_argument("--listen", required=True, help="host:port or unix:PATH")
    parser.add_argument("--step-ms", type=float, default=0.0, help="milliseconds that a step takes")
    parser.add_argument("--num-pages", type=int, default=defaults.num_pages)
    parser.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs)
    parser.add_argument(
        "--engine",
        choices=tuple(_ENGINES),
        default="null",
        help="null books pages as the real one does; clock costs nothing; stamps too, and its tokens are times",
    )
    parser.add_argument("--shape", choices=SHAPES, help="of the base that adapters must fit (a tiny one)")
    parser.add_argument("--max-lora-rank", type=int, default=64, help="with --shape")
    seat = parser.add_argument_group("options of the real one, which mean nothing here")
    for option in ("--model", "--store-dir", "--progress"):
        seat.add_argument(option, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = NullConfig(num_pages=args.num_pages, max_num_seqs=args.max_num_seqs, step_s=args.step_ms / 1000)
    if args.shape:
        config = replace(config, geometry=geometry_of(SHAPES[args.shape], args.max_lora_rank))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve_forever(args.listen, config, _ENGINES[args.engine]))


if __name__ == "__main__":
    main()
