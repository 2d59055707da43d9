"""Opens many Generate streams at once and reads them to their end; prints one line of JSON with what it saw."""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field

import grpc

from benchmarks.percentiles import percentiles
from benchmarks.streaming.stamps import age_s
from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import inference_pb2_grpc as pb_grpc

TIMEOUT_S = 120.0
# Of each stream, not counted in latencies: all streams open at the same moment, as no real load does.
RAMP_TOKENS = 10


@dataclass
class Seen:
    """What all streams together received, from the first chunk to the last."""

    num_messages: int = 0
    num_tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    ages_s: list[float] = field(default_factory=list)


async def _read(stub: "pb_grpc.InferenceServiceAsyncStub", request: pb.GenerateRequest, seen: Seen, with_ages: bool) -> None:
    num_tokens = 0
    async for response in stub.Generate(request, timeout=TIMEOUT_S):
        if not response.HasField("chunk"):
            continue
        now = time.monotonic()
        seen.first_at = seen.first_at or now
        seen.last_at = now
        seen.num_messages += 1
        seen.num_tokens += len(response.chunk.token_ids)
        num_tokens += len(response.chunk.token_ids)
        if with_ages and num_tokens > RAMP_TOKENS:
            seen.ages_s += [age_s(token_id, now) for token_id in response.chunk.token_ids]


async def run(address: str, num_streams: int, num_tokens: int, with_ages: bool) -> dict[str, float]:
    """Streams, all at once; the rates count from the first chunk to the last."""
    seen = Seen()
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling=pb.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        await asyncio.gather(*(_read(stub, request, seen, with_ages) for _ in range(num_streams)))
    wall_s = seen.last_at - seen.first_at
    result = {
        "messages_per_s": seen.num_messages / wall_s,
        "tokens_per_s": seen.num_tokens / wall_s,
        "tokens_per_message": seen.num_tokens / seen.num_messages,
        "wall_s": wall_s,
    }
    if with_ages:
        p50, p99 = percentiles(seen.ages_s, 50, 99)
        result |= {"latency_p50_ms": p50 * 1e3, "latency_p99_ms": p99 * 1e3}
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256, help="per stream")
    parser.add_argument("--latency", action="store_true", help="token ids are stamps: report how old they are")
    args = parser.parse_args()
    print(json.dumps(asyncio.run(run(args.target, args.streams, args.tokens, args.latency))))


if __name__ == "__main__":
    main()
