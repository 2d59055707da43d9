"""A data plane with one part replaced. It takes the options of `python -m dataplane` beside its own:

    python -m benchmarks.baselines.data_plane --baseline bmm --model DIR --store-dir DIR --listen ADDRESS

With `--baseline no-unify` it needs the control plane of benchmarks.baselines.control_plane, whose admission counts slots.
"""

import sys
from collections.abc import Sequence

from benchmarks.baselines.bmm_lora import BmmLoraOps
from benchmarks.baselines.fixed_slots import FixedSlots
from benchmarks.baselines.options import Baseline, BaselineOptions, parse_options
from dataplane.__main__ import main as serve_data_plane
from dataplane.assembly import DataPlane, load_data_plane
from dataplane.config import DataPlaneConfig
from dataplane.model.weights import Progress
from dataplane.parts import Parts


def parts_of(options: BaselineOptions) -> Parts:
    """What the baseline puts in the place of real parts."""
    match options.baseline:
        case Baseline.BMM:
            return Parts(lora_ops=BmmLoraOps)
        case Baseline.NO_UNIFY:
            return Parts(memory=FixedSlots(options.num_slots, options.slot_modules))


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; the exit code."""
    options = parse_options("benchmarks.baselines.data_plane", sys.argv[1:] if argv is None else argv, __doc__)
    parts = parts_of(options)

    def load(config: DataPlaneConfig, progress: Progress | None) -> DataPlane:
        return load_data_plane(config, progress, parts)

    return serve_data_plane(options.others, load)


if __name__ == "__main__":
    sys.exit(main())
