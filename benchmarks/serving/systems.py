"""What the systems are that a report sets side by side: in words, and what a result says of their sizes. Compares nothing."""

import re

from benchmarks.serving.records import OURS, Json

HOST_CACHE = re.compile(r"--host-cache-bytes[= ](\d+)")

# Of those that this repository has a name for.
ABOUT = {
    OURS: "the service as it is",
    "loraplane-bmm": "the same with LoRA as a padded `torch.bmm`, which no CUDA graph holds, so that no decode step is one",
    "loraplane-no-unify": "the same with slots for adapters, apart from the pages of KV",
    "loraplane-cold": "the same, its pool and host cache too small for the adapters, none on the device before a request asks",
    "loraplane-no-prefetch": "the same, no adapter on the device before a request asks",
    "loraplane-slo": "the same, told by each request when its first token must come",
    "peft": "transformers and peft, in static batches of one adapter",
}


def about_system(result: Json) -> str:
    """One system as an item of a list: what it is, how large its memories are, and how its planes were started."""
    parts = [ABOUT[result["system"]]] if result["system"] in ABOUT else []
    if result.get("pool"):
        parts.append(f"a pool of {result['pool']['num_pages'] * result['pool']['page_bytes'] / 2**30:.0f} GiB")
    host_cache = HOST_CACHE.search(result.get("data_plane") or "")
    if host_cache is not None:
        parts.append(f"a host cache of {int(host_cache[1]) / 2**30:.0f} GiB")
    limits = {run["max_seconds"] for run in result["runs"] if run.get("max_seconds")}
    if limits:
        parts.append(f"cut off after {max(limits):.0f} s, so that rates and latencies are those of what was completed by then")
    if result.get("commit"):
        parts.append(f"commit {result['commit']}")
    parts += [f"`{result[plane]}`" for plane in ("data_plane", "control_plane") if result.get(plane)]
    return f"- {result['system']}: {'; '.join(parts)}" if parts else f"- {result['system']}"
