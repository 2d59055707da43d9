"""A control plane for a baseline: admission counts slots where adapters have slots; for any other baseline it is the real one.

`python -m benchmarks.baselines.control_plane --baseline no-unify` takes the options of `python -m controlplane` beside its own.
"""

import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.baselines.options import Baseline, parse_options
from benchmarks.baselines.slot_ledger import SlotScheduler
from controlplane.__main__ import main as serve_control_plane


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; the exit code."""
    options = parse_options("benchmarks.baselines.control_plane", sys.argv[1:] if argv is None else argv, __doc__)
    if options.baseline is not Baseline.NO_UNIFY:
        return serve_control_plane(options.others)
    return serve_control_plane(options.others, partial(SlotScheduler, options.num_slots))


if __name__ == "__main__":
    sys.exit(main())
