"""The whole evaluation with one command: part after part as a process of its own, each with a time limit and a result file.

    python -m benchmarks.evaluation                        what docs/performance.md says of the service under load
    python -m benchmarks.evaluation --max-seconds 590      as much of it as fits, and which parts did not
    python -m benchmarks.evaluation --parts S1 S1-bmm
    python -m benchmarks.evaluation --suite tiny --results /tmp/tried      the harness itself, on a CPU
    python -m benchmarks.evaluation --list                 all parts, with the command of each

A part that fails or is cut off leaves what it had measured by then, and the others run all the same. Knows how parts are run;
what they are is in evaluation_parts.py.
"""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evaluation_parts import PARTS, SHORT, SUITES, TINY, Part
from benchmarks.options import make_parser
from benchmarks.process import ROOT
from benchmarks.process import STOP_TIMEOUT_S as PROCESS_STOP_TIMEOUT_S
from benchmarks.result_file import RESULTS
from benchmarks.screen import say
from benchmarks.session import kill_session

# Of a part that is told to end: it stops two planes one after the other, then clients, and deletes gigabytes of images.
STOP_TIMEOUT_S = 2 * PROCESS_STOP_TIMEOUT_S + 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part. state: done, failed, left out or interrupted."""

    part: Part
    state: str
    elapsed_s: float = 0.0
    why: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts and says at the end what became of each; 1 if one failed, 130 if Ctrl-C ended it before its time."""
    args = _parse(argv)
    extra = ("--commit", args.commit) if args.commit else ()
    if args.list:
        for part in PARTS:
            print(f"{part.suite:6s} {part.name:17s} about {part.takes_s:4.0f} s  {shlex.join(part.command(args.results, extra))}")
        return 0
    outcomes = run_parts(args.parts, args.results, args.max_seconds, extra)
    print("\n".join(table(outcomes)), flush=True)
    states = {outcome.state for outcome in outcomes}
    return 130 if "interrupted" in states else 1 if "failed" in states else 0


def run_parts(parts: Sequence[Part], results: Path, max_seconds: float | None, extra: Sequence[str] = ()) -> list[Outcome]:
    """One part after the other, until Ctrl-C. max_seconds: of all together; a part that is likely to take longer than is left is
    left out. extra: arguments of every part.
    """
    started_at = time.monotonic()
    outcomes = []
    for part in parts:
        left_s = float("inf") if max_seconds is None else max_seconds - (time.monotonic() - started_at)
        if part.takes_s > left_s:
            why = f"it takes about {part.takes_s:.0f} s, and {max(0.0, left_s):.0f} of --max-seconds are left"
            outcomes.append(Outcome(part, "left out", why=why))
        else:
            outcomes.append(_run(part, part.command(results, extra), min(part.limit_s, left_s)))
        say(f"{outcomes[-1].state}: {part.name} {outcomes[-1].why}")
        if outcomes[-1].state == "interrupted":
            break
    return outcomes


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each part."""
    return [f"{o.part.name:17s} {o.state:11s} {o.elapsed_s:6.0f} s  {o.why or o.part.result}" for o in outcomes]


def _run(part: Part, command: Sequence[str], limit_s: float) -> Outcome:
    say(f"{part.name}: {part.arguments}")
    started_at = time.monotonic()
    try:
        code = _exit_code(command, limit_s)
        state, why = ("failed", f"exit code {code}") if code else ("done", "")
    except subprocess.TimeoutExpired:
        state, why = "failed", f"cut off after {limit_s:.0f} s"
    except KeyboardInterrupt:
        state, why = "interrupted", "cut off by Ctrl-C"
    return Outcome(part, state, time.monotonic() - started_at, why)


def _exit_code(command: Sequence[str], limit_s: float) -> int:
    """That of the part. Whatever happens, neither it nor what it started runs afterwards.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    # Ctrl-C is for this process, which ends the part in order. A session, as planes have process groups of their own; only Redis
    # leaves it, and ends with its plane.
    process = subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(limit_s)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends it if it runs, as Ctrl-C would, so that it stops what it started; what is left then is killed, as it is by a second
    Ctrl-C.
    """
    try:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:
        process.kill()
        if left := kill_session(process.pid):
            say(f"processes {', '.join(map(str, left))} were killed and still run; what is measured now may be slower for them")
        process.poll()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.evaluation", __doc__)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--suite", choices=SUITES, default=SHORT, help=f"which parts ({SHORT})")
    chosen.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], metavar="NAME", help="these, in this order")
    parser.add_argument("--list", action="store_true", help="show all parts and run none")
    parser.add_argument("--max-seconds", type=float, metavar="SECONDS", help="of all parts together (no limit)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where result files go (benchmarks/results)")
    parser.add_argument("--commit", help="of what is measured, if that is a copy without its history")
    args = parser.parse_args(argv)
    by_name = {part.name: part for part in PARTS}
    args.parts = [by_name[name] for name in args.parts or ()] or [part for part in PARTS if part.suite == args.suite]
    if args.results is None and not args.list and any(part.suite == TINY for part in args.parts):
        parser.error(f"--suite {TINY} measures nothing that the report should show; give --results DIR")
    # Parts run in the root of the repository.
    args.results = args.results.resolve() if args.results else RESULTS.relative_to(ROOT)
    return args


if __name__ == "__main__":
    # Ctrl-C is heard in a shell's background job as well, where it would be ignored, by the parts too; and SIGTERM is the same.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
