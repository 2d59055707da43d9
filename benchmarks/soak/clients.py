"""Clients of the soak: random requests, kept coming; some leave early, some are watched token by token. Judges nothing."""

import asyncio
import itertools
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.soak.service import SoakService
from protos.loraplane.v1 import inference_pb2 as pb

# A request of a soak may wait long behind others, but not for ever.
TIMEOUT_S = 300.0
# Alternatives reported for each token of a watched request: two runs that differ mostly swap neighbours among these.
NUM_LOGPROBS = 8

BASE_SHARE = 0.05
ABORT_SHARE = 0.1
SEEDED_SHARE = 0.2
# Popularity falls off: number n of N is drawn as floor(N * u^2), so that some adapters stay and most come and go.
POPULARITY = 2.0


@dataclass(frozen=True, slots=True)
class SoakLoad:
    """What requests are drawn from."""

    adapters: tuple[str, ...]
    vocab_size: int
    max_prompt_tokens: int
    max_output_tokens: int
    watched_share: float


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """One request. seed: None for greedy. abort_after: tokens after which its client leaves."""

    adapter: str
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None
    abort_after: int | None = None
    is_watched: bool = False


@dataclass(slots=True)
class Answer:
    """What came back. tops: logprobs by token at each position, of the most likely ones; only if asked for."""

    token_ids: list[int] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)
    num_preemptions: int = 0


# Two answers to the same request.
Pair = tuple[Answer, Answer]


@dataclass(slots=True)
class SoakCounts:
    """What the clients saw. watched: with the answers they got under load."""

    num_finished: int = 0
    num_aborted: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    watched: list[tuple[SoakRequest, Answer]] = field(default_factory=list)


def draw(load: SoakLoad, number: int) -> SoakRequest:
    """The request of that number: the same in every run."""
    rng = random.Random(number)
    adapter = load.adapters[int(len(load.adapters) * rng.random() ** POPULARITY)] if rng.random() >= BASE_SHARE else ""
    prompt = tuple(rng.randrange(load.vocab_size) for _ in range(rng.randint(1, load.max_prompt_tokens)))
    max_tokens = rng.randint(1, load.max_output_tokens)
    seed = rng.randrange(1 << 32) if rng.random() < SEEDED_SHARE else None
    abort_after = rng.randrange(max_tokens) if rng.random() < ABORT_SHARE else None
    is_watched = abort_after is None and rng.random() < load.watched_share
    return SoakRequest(adapter, prompt, max_tokens, seed, abort_after, is_watched)


async def generate(service: SoakService, request: SoakRequest, expected: Sequence[int] | None = None) -> Answer:
    """Sends one request and reads its stream to the end, or until its client leaves.

    expected: the client leaves when a token is another one.

    Raises:
        AssertionError: it ended too early or too late.
    """
    sampling = pb.SamplingParams(
        max_tokens=request.max_tokens,
        temperature=0.0 if request.seed is None else 1.0,
        seed=request.seed,
        ignore_eos=True,
    )
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=request.prompt),
        adapter=request.adapter,
        sampling=sampling,
        logprobs=NUM_LOGPROBS if request.is_watched else None,
        output=pb.OutputOptions(token_ids_only=True),
    )
    answer = Answer()
    stream = service.inference.Generate(message, timeout=TIMEOUT_S)
    async for response in stream:
        if response.HasField("chunk"):
            answer.token_ids += response.chunk.token_ids
            answer.tops += [{top.token_id: top.logprob for top in token.top} for token in response.chunk.logprobs]
        if response.HasField("finished"):
            answer.num_preemptions = response.finished.timings.num_preemptions
        has_enough = request.abort_after is not None and len(answer.token_ids) >= request.abort_after
        if has_enough or (expected is not None and answer.token_ids != list(expected[: len(answer.token_ids)])):
            stream.cancel()
            return answer
    assert len(answer.token_ids) == request.max_tokens, f"{len(answer.token_ids)} tokens of {request.max_tokens}"
    return answer


async def keep_busy(service: SoakService, load: SoakLoad, num_clients: int, seconds: float) -> SoakCounts:
    """Clients that send one request after the other, for so long; then waits for the last of them."""
    counts, numbers, ends_at = SoakCounts(), itertools.count(), time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < ends_at:
            request = draw(load, next(numbers))
            answer = await generate(service, request)
            counts.num_tokens += len(answer.token_ids)
            counts.num_prompt_tokens += len(request.prompt)
            if request.abort_after is not None:
                counts.num_aborted += 1
                continue
            counts.num_finished += 1
            if request.is_watched:
                counts.watched.append((request, answer))

    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(client())
    return counts


async def one_by_one(service: SoakService, requests: Iterable[SoakRequest]) -> list[Answer]:
    """Each alone in the service."""
    return [await generate(service, request) for request in requests]


async def answer_again(service: SoakService, answered: Iterable[tuple[SoakRequest, Answer]], max_tokens: int) -> list[Pair]:
    """Each alone in the service, up to the first token that differs, until there were so many; with the answer before."""
    pairs: list[Pair] = []
    for request, answer in answered:
        again = await generate(service, request, answer.token_ids)
        pairs.append((answer, again))
        max_tokens -= len(again.token_ids)
        if max_tokens <= 0:
            break
    return pairs


async def all_at_once(service: SoakService, requests: Sequence[SoakRequest]) -> list[Answer]:
    """All in one batch."""
    return list(await asyncio.gather(*(generate(service, request) for request in requests)))
