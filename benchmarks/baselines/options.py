"""The command line of a baseline's processes: its own options, and all others handed on to the real process unchanged."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from adapter_store.geometry import LORA_MODULES

NUM_SLOTS = 32


class Baseline(Enum):
    """What is compared with. BMM: padded torch.bmm for LoRA. NO_UNIFY: fixed adapter slots apart from KV."""

    BMM = "bmm"
    NO_UNIFY = "no-unify"


@dataclass(frozen=True, slots=True)
class BaselineOptions:
    """slot_modules: those that a slot has room for, all of the base if empty. others: what is handed on."""

    baseline: Baseline
    num_slots: int
    slot_modules: tuple[str, ...]
    others: tuple[str, ...]


def parse_options(prog: str, argv: Sequence[str]) -> BaselineOptions:
    """Reads the options; ends the process with a message when they are not right."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("--baseline", required=True, choices=[baseline.value for baseline in Baseline])
    parser.add_argument("--slots", type=int, default=NUM_SLOTS, metavar="N", help=f"adapter slots of no-unify ({NUM_SLOTS})")
    parser.add_argument(
        "--slot-modules", default="", metavar="NAMES", help="modules that a slot has room for, with commas between (all)"
    )
    args, others = parser.parse_known_args(argv)
    if args.slots < 1:
        parser.error(f"--slots is {args.slots}; at least 1 is needed")
    modules = tuple(name for name in args.slot_modules.split(",") if name)
    unknown = set(modules) - set(LORA_MODULES)
    if unknown:
        parser.error(f"--slot-modules has {', '.join(sorted(unknown))}; there are {', '.join(LORA_MODULES)}")
    return BaselineOptions(Baseline(args.baseline), args.slots, modules, tuple(others))
