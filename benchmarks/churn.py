"""A soak of the whole service: a pool that KV and adapters fill to the last page, several hundred adapters that come and go.

Ends with the books of the engine checked, and compares requests with what they answer alone. In float32 the tokens must be the
same; in half precision a first token that differs must be one about which base-only runs of two batch sizes differ as much.
`python -m benchmarks.churn` does both on a CUDA device and writes results/churn.json.
"""

import argparse
import asyncio
import gc
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.model_shapes import ModelShape
from benchmarks.result_file import RESULTS, cpu_name, write_result
from benchmarks.soak.adapters import register_random
from benchmarks.soak.agreement import Agreement, compare
from benchmarks.soak.clients import Answer, SoakLoad, SoakRequest, all_at_once, keep_busy, one_by_one
from benchmarks.soak.monitor import watch_pool
from benchmarks.soak.service import ServiceOptions, SoakService, serve_both

# Few layers, so that many steps fit in a minute; as wide as a real model, whose matrices cuBLAS multiplies in another order for
# another batch: what adapters do to rounding is compared with that.
WIDE = ModelShape("soak-wide", 2, 4096, 32, 8, 11008, 4096, 1024)
TINY = ModelShape("soak-tiny", 2, 64, 4, 2, 160, 256, 256)

# Of a base-only request, most of which are behind the first token that differs.
MAX_BASE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Soak:
    """One setting. ranks: given to the adapters in turn. num_compared: requests that are run alone at the end."""

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
    num_compared: int
    num_base: int


SOAKS = {
    "wide": Soak(WIDE, 1600, 64, 512, 96, 240, (4, 8, 16, 40), 128, 384, 0.05, 64, 96),
    "tiny": Soak(TINY, 80, 16, 64, 24, 40, (2, 4, 8, 3), 32, 120, 0.3, 12, 12),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak, prints what it saw and writes the result. 1 if what is asked of it does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", choices=SOAKS, default="wide")
    parser.add_argument("--seconds", type=float, default=120.0, help="of load; the comparisons come on top")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["bfloat16", "float32"], help="one soak after the other")
    parser.add_argument("--out", type=Path, default=RESULTS / "churn.json")
    parser.add_argument("--commit", help="what was measured, where it is a copy without its history")
    args = parser.parse_args(arguments)
    soaks = []
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as directory:
            soaks.append(asyncio.run(run(SOAKS[args.soak], Path(directory), args.device, dtype, args.seconds)))
        for name, value in soaks[-1].items():
            print(f"{name}: {value}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    write_result(args.out, {"soaks": soaks}, ("torch",), device=device, commit=args.commit)
    return 0 if all(soak["holds"] for soak in soaks) else 1


async def run(soak: Soak, root: Path, device: str, dtype: str, seconds: float) -> dict[str, object]:
    """Serves, loads, compares; the context's end checks the books.

    Raises:
        AssertionError: pages, adapters or requests were not where the books say, or a request got too few tokens.
    """
    options = ServiceOptions(device, dtype, soak.num_pages, soak.max_num_seqs, soak.token_budget, max(soak.ranks))
    async with serve_both(root, soak.shape, options) as service:
        started_at = time.monotonic()
        ranks = [soak.ranks[i % len(soak.ranks)] for i in range(soak.num_adapters)]
        names = await register_random(service, root, soak.shape, ranks)
        print(f"{len(names)} adapters registered in {time.monotonic() - started_at:.1f} s", flush=True)
        base = await _base_agreement(service, soak)
        load = SoakLoad(tuple(names), soak.shape.vocab_size, soak.max_prompt_tokens, soak.max_output_tokens, soak.watched_share)
        async with watch_pool(service, soak.num_pages) as watch:
            counts = await keep_busy(service, load, soak.num_clients, seconds)
        await service.wait_idle()
        watched = [(r, answer) for r, answer in counts.watched if dtype == "float32" or r.seed is None]
        watched = random.Random(0).sample(watched, min(len(watched), soak.num_compared))
        churned, wrong = await _compare_with_alone(service, watched)
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
        "base_only": base.summary(),
        "churned": churned.summary(),
        "wrong_adapter": wrong.summary(),
        "holds": _holds(base, churned, dtype),
    }


def _holds(base: Agreement, churned: Agreement, dtype: str) -> bool:
    if dtype == "float32":
        return churned.num_equal == churned.num_pairs
    return churned.max_at_difference <= base.max_shift


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
    return compare(list(zip(together, await one_by_one(service, requests), strict=True)))


async def _compare_with_alone(service: SoakService, watched: list[tuple[SoakRequest, Answer]]) -> tuple[Agreement, Agreement]:
    """With what they answer alone; and, to show what an error looks like, their first tokens with those of the base model."""
    requests = [request for request, _ in watched]
    alone = await one_by_one(service, requests)
    churned = compare([(answer, again) for (_, answer), again in zip(watched, alone, strict=True)])
    firsts = [replace(request, max_tokens=1) for request in requests if request.adapter]
    right = await one_by_one(service, firsts)
    wrong = await one_by_one(service, [replace(request, adapter="") for request in firsts])
    return churned, compare(list(zip(right, wrong, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
