"""What the evaluation consists of, as data: the command of each part, and about how long it takes on an H200. Runs nothing."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.records import OURS

# What the report on serving needs; settings of the paper, at its rates and for its durations, which takes long; the parts of the
# service alone; everything in small, on a CPU.
SUITES = (SHORT, PAPER, PIECES, TINY) = ("short", "paper", "pieces", "tiny")
MIN_LIMIT_S = 120.0
LIMIT_FACTOR = 2.5


@dataclass(frozen=True, slots=True)
class Part:
    """arguments: of python -m. result: the file's name. takes_s: about how long; only limits on time ask for it."""

    suite: str
    name: str
    result: str
    takes_s: float
    arguments: str

    @property
    def limit_s(self) -> float:
        """When it is taken to hang: the first start on a machine compiles kernels."""
        return max(MIN_LIMIT_S, LIMIT_FACTOR * self.takes_s)

    def command(self, results: Path, extra: Sequence[str] = ()) -> list[str]:
        """As one would type it."""
        return ["python", "-m", *shlex.split(self.arguments), "--out", str(results / self.result), *extra]


def _serving(suite: str, name: str, takes_s: float, arguments: str, system: str = OURS) -> Part:
    """Named S1-bmm, its result is serving_SYSTEM_S1.json; what else distinguishes it stands behind the setting."""
    setting, _, rest = name.partition("-")
    suffix = f"_{rest}" if rest and system == OURS else ""
    named = f" --system {system}" if system != OURS else ""
    result = f"serving_{system}_{setting}{suffix}.json"
    return Part(suite, name, result, takes_s, f"benchmarks.serve --setting {setting} {arguments}{named}")


_BMM = "benchmarks.baselines.data_plane --baseline bmm"


def _no_unify(num_slots: int, of_data_plane: str) -> str:
    """Both planes of that baseline, as one option each."""
    baseline = f"--baseline no-unify --slots {num_slots}"
    return (
        f"--data-plane 'benchmarks.baselines.data_plane {baseline} {of_data_plane}' "
        f"--control-plane 'benchmarks.baselines.control_plane {baseline}'"
    )


# As large as the adapters that are served, and no larger.
_SLOTS = _no_unify(32, "--slot-modules q_proj,k_proj,v_proj,o_proj --max-lora-rank 8")
_PEFT = "benchmarks.baselines.peft_serve --setting"
_CPU = "--device cpu --num-pages 400"
_FEW = "--adapters 3 --requests 12 --lengths 4,12 --clients 1 --warmup 4"

PARTS = (
    _serving(SHORT, "S1", 145, "--adapters 5,100,1000,2000 --base-only"),
    _serving(SHORT, "S1-fixed", 50, "--fixed 64x128x256,32x128x256,32x128x256:32 --repeat 3"),
    _serving(SHORT, "S2", 115, "--adapters 5,100,400 --base-only"),
    _serving(SHORT, "S2-fixed", 35, "--fixed 64x128x256:8 --repeat 3"),
    _serving(SHORT, "S1-rates", 220, "--adapters 5,1000 --rates 50%,80%,95% --duration 20"),
    _serving(SHORT, "S1-cv", 150, "--adapters 1000 --rates 80% --cvs 1,2,4,8 --duration 15"),
    _serving(SHORT, "S1-bmm", 150, f"--adapters 5,100,1000 --base-only --data-plane '{_BMM}'", "loraplane-bmm"),
    _serving(SHORT, "S1-no-unify", 105, f"--adapters 5,100,1000 --base-only {_SLOTS}", "loraplane-no-unify"),
    Part(SHORT, "S1-peft", "serving_peft_S1.json", 80, f"{_PEFT} S1 --adapters 5,100 --max-seconds 30"),
    # A pool with pages for half of the adapters beside the KV, a host cache for a quarter, and none on the device before requests
    # ask for it: they come and go all the time.
    _serving(
        SHORT,
        "S1-cold",
        70,
        "--adapters 1000 --base-only --no-idle-prefetch --data-plane 'dataplane --num-pages 7700 --host-cache-bytes 4294967296'",
        "loraplane-cold",
    ),
    Part(SHORT, "registration", "registration.json", 25, "benchmarks.registration --adapters 1000"),
    # Table 3 of the paper: 10 requests a second for two minutes. An adapter of S4 takes 120 MB, so there are fewer.
    _serving(PAPER, "S1-table3", 720, "--adapters 5,100,1000,2000 --base-only --no-saturated --rates 10 --duration 120"),
    _serving(PAPER, "S2-table3", 480, "--adapters 5,100,400 --base-only --no-saturated --rates 10 --duration 120"),
    _serving(PAPER, "S4-table3", 480, "--adapters 2,100,400 --base-only --no-saturated --rates 10 --duration 120"),
    _serving(PAPER, "S1-rate", 1080, "--adapters 1000 --no-saturated --rates 5,10,15,20,25,30,35,40 --duration 120"),
    _serving(PAPER, "S1-bursts", 1000, "--adapters 1000 --rates 80% --cvs 1,2,4,6,8 --duration 180"),
    # With the limit on the first token sent along, so that the scheduler may give up what would be late.
    _serving(PAPER, "S1-bursts-slo", 1000, "--adapters 1000 --rates 80% --cvs 1,2,4,6,8 --duration 180 --slo 6", "loraplane-slo"),
    Part(PIECES, "kernels", "kernels.json", 20, "benchmarks.kernels"),
    Part(PIECES, "engine", "engine.json", 80, "benchmarks.engine"),
    Part(PIECES, "adapters", "adapters.json", 30, "benchmarks.adapters"),
    Part(PIECES, "churn", "churn.json", 170, "benchmarks.churn --dtypes bfloat16"),
    Part(PIECES, "churn-float32", "churn_float32.json", 200, "benchmarks.churn --dtypes float32 --seconds 80"),
    Part(PIECES, "control-plane", "control_plane.json", 90, "benchmarks.control_plane"),
    _serving(TINY, "tiny", 20, f"{_FEW} --base-only --rates 80% --duration 0.5 --data-plane 'dataplane {_CPU}'"),
    _serving(TINY, "tiny-bmm", 20, f"{_FEW} --data-plane '{_BMM} {_CPU}'", "loraplane-bmm"),
    _serving(TINY, "tiny-no-unify", 20, f"{_FEW} {_no_unify(2, _CPU)}", "loraplane-no-unify"),
    Part(TINY, "tiny-peft", "serving_peft_tiny.json", 20, f"{_PEFT} tiny --adapters 3 --requests 8 --lengths 4,12 --device cpu"),
    Part(TINY, "tiny-registration", "registration.json", 20, "benchmarks.registration --adapters 20 --shape tiny"),
)
