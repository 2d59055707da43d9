"""Results that were never measured, in the form in which the benchmarks write them: for tests of the report alone."""

import math
from typing import Any

Json = dict[str, Any]


def spread(p50: float) -> dict[str, float]:
    """Percentiles that rise from a median."""
    return {"mean": 1.1 * p50, "p50": p50, "p90": 1.8 * p50, "p99": 3 * p50, "max": 4 * p50}


def run(num_adapters: int, requests_per_s: float, *, load: bool = True, **fields: Any) -> Json:
    """One run; saturated unless the fields say otherwise."""
    ticks = [0.25 * t for t in range(60)]
    kv = [int(6000 * math.sin(math.pi * t / 15)) for t in ticks]
    resident = [int(min(2500, 400 * t)) for t in ticks]
    samples = {
        "t_s": ticks,
        "kv_pages": kv,
        "adapter_pages": resident,
        "idle_adapter_pages": [pages // 3 for pages in resident],
        "free_pages": [9000 - a - b for a, b in zip(kv, resident, strict=True)],
    }
    made = {
        "kind": "saturated",
        "num_adapters": num_adapters,
        "alpha": 1.0,
        "lengths": [8, 512],
        "num_requests": 400,
        "num_completed": 398,
        "requests_per_s": requests_per_s,
        "output_tokens_per_s": 260 * requests_per_s,
        "tokens_per_message": 1.25,
        "wall_s": 15.0,
        "e2e_s": spread(7.0),
        "ttft_s": spread(0.08),
        "itl_s": spread(0.02),
        "tpot_s": spread(0.02),
        "late_s": spread(0.004),
        "slo_attainment": 0.9,
        "satisfaction": 0.8,
        "errors": {},
        "server": {"adapter_wait_s": spread(0.0004), "adapter_hit_rate": 0.75} if num_adapters else {"adapter_wait_s": {}},
        **fields,
    }
    if load:
        made["cpu_s"] = {"control_plane": 4.5, "data_plane": 15.0, "clients": [3.0, 6.0]}
        made["gpu_busy_share"] = 0.97
        made["load"] = {"mean_step_s": 0.0101, "engine_busy_share": 0.991, "num_resident_before": 1500, "samples": samples}
    return made


def result(system: str, setting: str, runs: list[Json]) -> Json:
    """A result file's content."""
    return {
        "device": "an imagined GPU",
        "versions": {"python": "3.12", "torch": "9.9"},
        "commit": "0123456789ab",
        "date": "2000-01-01",
        "command": f"python -m benchmarks.serve --setting {setting}",
        "system": system,
        "setting": setting,
        "model": "llama-7b",
        "ranks": [64, 32, 16, 8],
        "modules": ["q_proj", "v_proj"],
        "data_plane": "dataplane --host-cache-bytes 4294967296",
        "pool": {"num_pages": 9000, "page_tokens": 16, "page_bytes": 8 << 20},
        "runs": runs,
    }


def results() -> dict[str, Json]:
    """Two settings; three systems in one of them, with arrivals at rates."""
    counts = (5, 100, 1000, 2000)
    at_rates = [
        run(n, 0.98 * rate, kind="open_loop", rate=rate, rate_share=rate / 30, cv=cv, duration_s=60.0, **fields)
        for rate in (15.0, 24.0, 28.5)
        for cv in (1.0, 4.0, 8.0)
        for n in counts
        for fields in [{"ttft_s": spread(0.002 * rate + n / 1e5), "slo_attainment": 1 / (1 + (rate / 32) ** 12 * cv**0.5)}]
    ]
    ours = [run(0, 34.0), *(run(n, 33.5 - n / 1000) for n in counts), *at_rates]
    # Repeated: 9,100 is the one in the middle.
    fixed = [
        run(8, rate / 256, kind="fixed", fixed="64x128x256", num_requests=64, output_tokens_per_s=rate)
        for rate in (9100.0, 9500.0, 8200.0)
    ]
    theirs = [run(n, 17.0 / n**0.2) for n in counts[:3]]
    static = [run(n, 1.7 / n**0.5, load=False) for n in counts[:2]]
    for each in static:
        each["server"] = {}
    return {
        "serving_peft_S1": result("peft", "S1", static),
        "serving_loraplane_S1": result("loraplane", "S1", ours),
        "serving_loraplane-bmm_S1": result("loraplane-bmm", "S1", theirs),
        "serving_loraplane_S2": result("loraplane", "S2", [run(0, 34.0), run(5, 31.0), run(100, 29.0), run(400, 27.0), *fixed]),
    }
