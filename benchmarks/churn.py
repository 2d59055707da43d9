"""A soak of the whole service: a pool that KV and adapters fill, now and then to the last page, and adapters that come and go.

Ends with the books of the engine checked, and compares requests with what they answer alone. In float32 the tokens must be the
same; in half precision a first token that differs must be one about which base-only runs of two batch sizes differ as much.
`python -m benchmarks.churn` does both on a CUDA device and writes results/churn.json, again after each.
"""

import argparse
import asyncio
import gc
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_timing import device_name
from benchmarks.model_shapes import ModelShape
from benchmarks.options import DTYPES, add_device_option, add_result_options, comma_list, make_parser
from benchmarks.result_file import RESULTS, ResultFile
from benchmarks.screen import say, show
from benchmarks.soak.adapters import register_random
from benchmarks.soak.agreement import Agreement, compare
from benchmarks.soak.clients import Answer, SoakLoad, SoakRequest, all_at_once, answer_again, keep_busy, one_by_one
from benchmarks.soak.monitor import watch_pool
from benchmarks.soak.service import PlaneOptions, SoakService, serve_both

# Few layers, so that many steps fit in a minute; as wide as a real model, whose matrices cuBLAS multiplies in another order for
# another batch: what adapters do to rounding is compared with that.
WIDE = ModelShape("soak-wide", 2, 4096, 32, 8, 11008, 4096, 1024)
TINY = ModelShape("soak-tiny", 2, 64, 4, 2, 160, 256, 256)

# Of a base-only request, most of which are behind the first token that differs.
MAX_BASE_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Soak:
    """One setting. ranks: given to the adapters in turn. num_base: base-only requests that are run in two batch sizes.

    max_alone_tokens: of requests that are run alone, in each comparison. Alone, a token is a step, of 2 to 10 ms on a GPU.
    """

    shape: ModelShape
    num_pages: int
    max_num_seqs: int
    token_budget: int
    num_clients: int
    num_adapters: int
    ranks: tuple[int, ...]
    max_prompt_tokens: int
    max_output_tokens: int
    watched_share: float
    max_alone_tokens: int
    num_base: int


SOAKS = {
    "wide": Soak(WIDE, 1600, 64, 512, 96, 240, (4, 8, 16, 40), 128, 384, 0.05, 2500, 64),
    "tiny": Soak(TINY, 80, 16, 64, 24, 40, (2, 4, 8, 3), 32, 120, 0.3, 600, 12),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the soaks and shows what they saw. 1 if one failed, or what is asked of it does not hold."""
    parser = make_parser("benchmarks.churn", __doc__)
    parser.add_argument("--soak", choices=SOAKS, default="wide", help="(wide)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of load in each dtype; comparisons come on top (120)")
    add_device_option(parser)
    parser.add_argument(
        "--dtypes",
        type=comma_list(str, DTYPES),
        default=("bfloat16", "float32"),
        metavar="NAME,...",
        help="one soak after the other (bfloat16,float32)",
    )
    add_result_options(parser, "churn.json")
    args = parser.parse_args(argv)
    packages = ("torch", "cupy-cuda13x", "flashinfer-python")
    result = ResultFile(args.out or RESULTS / "churn.json", packages, device=device_name(args.device), commit=args.commit)
    soaks = result.measured["soaks"] = []
    for dtype in args.dtypes:
        result.add(dtype, partial(_soak, args, dtype, soaks))
        gc.collect()
        torch.cuda.empty_cache()
    return 1 if result.failed or not all(soak["holds"] for soak in soaks) else 0


def _soak(args: argparse.Namespace, dtype: str, soaks: list[dict[str, Any]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        soaks.append(asyncio.run(run(SOAKS[args.soak], Path(directory), args.device, dtype, args.seconds)))
    show(dtype, soaks[-1])
    return {}


async def run(soak: Soak, root: Path, device: str, dtype: str, seconds: float) -> dict[str, Any]:
    """Serves, loads, compares; the context's end checks the books.

    Raises:
        AssertionError: pages, adapters or requests were not where the books say, or a request got too few tokens.
    """
    is_exact = dtype == "float32"
    options = PlaneOptions(device, dtype, soak.num_pages, soak.max_num_seqs, soak.token_budget, max(soak.ranks))
    async with serve_both(root, soak.shape, options) as service:
        clock = _Clock(dtype)
        ranks = [soak.ranks[i % len(soak.ranks)] for i in range(soak.num_adapters)]
        names = await register_random(service.channel, root, soak.shape, ranks)
        clock.lap(f"{len(names)} adapters registered")
        base = None if is_exact else await _base_agreement(service, soak)
        clock.lap("base-only requests compared")
        load = SoakLoad(tuple(names), soak.shape.vocab_size, soak.max_prompt_tokens, soak.max_output_tokens, soak.watched_share)
        async with watch_pool(service, soak.num_pages) as watch:
            counts = await keep_busy(service, load, soak.num_clients, seconds)
        await service.wait_idle()
        clock.lap("load")
        # A seeded request draws near a boundary whatever rounding says: only exact arithmetic gives it the same tokens.
        watched = _by_preemption(pair for pair in counts.watched if is_exact or pair[0].seed is None)
        pairs = await answer_again(service, watched, soak.max_alone_tokens)
        churned, watched = compare(pairs), watched[: len(pairs)]
        wrong = None if is_exact else await _wrong_adapter(service, [request for request, _ in watched if request.adapter])
        clock.lap(f"{len(pairs)} requests compared with what they answer alone")
    return {
        "model": soak.shape.name,
        "dtype": dtype,
        "pages": soak.num_pages,
        "adapters": soak.num_adapters,
        "ranks": sorted(set(soak.ranks)),
        "clients": soak.num_clients,
        "requests_finished": counts.num_finished,
        "requests_aborted": counts.num_aborted,
        "tokens": counts.num_tokens,
        "prompt_tokens": counts.num_prompt_tokens,
        **watch.summary(),
        "integrity": "clean",
        "watched_preempted": sum(answer.num_preemptions > 0 for _, answer in watched),
        "churned": churned.summary(),
        "base_only": base.summary() if base is not None else None,
        "wrong_adapter": wrong.summary() if wrong is not None else None,
        "holds": _holds(churned, base),
    }


def _holds(churned: Agreement, base: Agreement | None) -> bool:
    """base: None where the tokens must be the same."""
    if not churned.num_pairs:
        return False
    return churned.num_equal == churned.num_pairs if base is None else churned.max_at_difference <= base.max_shift


def _by_preemption(watched: Iterable[tuple[SoakRequest, Answer]]) -> list[tuple[SoakRequest, Answer]]:
    """Those that were preempted first, by chance otherwise."""
    shuffled = list(watched)
    random.Random(0).shuffle(shuffled)
    return sorted(shuffled, key=lambda pair: pair[1].num_preemptions == 0)


async def _base_agreement(service: SoakService, soak: Soak) -> Agreement:
    """Base-only requests, alone and all in one batch: how far rounding goes where no adapter is involved."""
    rng = random.Random("base")
    prompts = [
        tuple(rng.randrange(soak.shape.vocab_size) for _ in range(rng.randint(1, soak.max_prompt_tokens)))
        for _ in range(soak.num_base)
    ]
    max_tokens = min(soak.max_output_tokens, MAX_BASE_TOKENS)
    requests = [SoakRequest("", prompt, max_tokens, is_watched=True) for prompt in prompts]
    together = await all_at_once(service, requests)
    return compare(await answer_again(service, zip(requests, together, strict=True), soak.max_alone_tokens))


async def _wrong_adapter(service: SoakService, requests: Iterable[SoakRequest]) -> Agreement:
    """What an error would look like: first tokens of adapters beside those of the base model."""
    firsts = [replace(request, max_tokens=1) for request in requests]
    right = await one_by_one(service, firsts)
    wrong = await one_by_one(service, [replace(request, adapter="") for request in firsts])
    return compare(list(zip(right, wrong, strict=True)))


class _Clock:
    """Says how long each part of a soak took."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun_at = time.monotonic()

    def lap(self, part: str) -> None:
        """The end of a part."""
        now = time.monotonic()
        say(f"{self._name}: {part}, {now - self._begun_at:.1f} s")
        self._begun_at = now


if __name__ == "__main__":
    sys.exit(main())
