"""The command line of a baseline's processes: its own options, and all others handed on to the real process unchanged."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from adapter_store.geometry import LORA_MODULES
from benchmarks.options import comma_list, make_parser

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


def parse_options(module: str, argv: Sequence[str], description: str | None = None) -> BaselineOptions:
    """Reads the options; ends the process with a message when they are not right."""
    parser = make_parser(module, description)
    parser.add_argument("--baseline", required=True, choices=[baseline.value for baseline in Baseline])
    parser.add_argument("--slots", type=int, default=NUM_SLOTS, metavar="N", help=f"adapter slots of no-unify ({NUM_SLOTS})")
    parser.add_argument(
        "--slot-modules",
        type=comma_list(str, LORA_MODULES),
        default=(),
        metavar="NAME,...",
        help="modules that a slot has room for (all)",
    )
    args, others = parser.parse_known_args(argv)
    if args.slots < 1:
        parser.error(f"--slots is {args.slots}; at least 1 is needed")
    return BaselineOptions(Baseline(args.baseline), args.slots, args.slot_modules, tuple(others))
