"""A gRPC server that streams tokens and does nothing else: the ceiling that Python gRPC sets for the control plane.

It answers `InferenceService.Generate` with one Chunk per token. Knows no model, no queue and no scheduler.
"""

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc

from benchmarks.streaming.stamps import stamp
from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import inference_pb2_grpc as pb_grpc


class EchoService(pb_grpc.InferenceServiceServicer):
    """Streams `max_tokens` Chunks of one token; with a pace, all streams get their next token at the same tick."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id))
        made_at = stamp()
        for _ in range(request.sampling.max_tokens):
            if self._step_s:
                now = time.monotonic()
                tick = (int(now / self._step_s) + 1) * self._step_s
                await asyncio.sleep(tick - now)
                # That of the tick, as a step stamps all its tokens: waiting for the other streams' turn is part of the latency.
                made_at = stamp(tick)
            yield pb.GenerateResponse(chunk=pb.Chunk(token_ids=[made_at], text="word "))
        yield pb.GenerateResponse(finished=pb.Finished(finish_reason=pb.FINISH_REASON_LENGTH))


async def _serve(listen: str, step_s: float) -> None:
    server = grpc.aio.server()
    pb_grpc.add_InferenceServiceServicer_to_server(EchoService(step_s), server)
    server.add_insecure_port(listen)
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True, help="host:port or unix:PATH")
    parser.add_argument("--step-ms", type=float, default=0.0, help="milliseconds between tokens of a stream; 0 is no limit")
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(args.listen, args.step_ms / 1000))


if __name__ == "__main__":
    main()
