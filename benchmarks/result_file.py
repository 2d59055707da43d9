"""Writes what a benchmark measured as JSON under benchmarks/results/, with everything needed to judge it later."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

_NUMBERS = re.compile(r"\[([\s\d.,eE+-]+)\]")
RESULTS = Path(__file__).resolve().parent / "results"


def write_result(
    path: Path,
    measured: Mapping[str, object],
    packages: tuple[str, ...],
    *,
    device: str | None = None,
    commit: str | None = None,
) -> None:
    """Writes `measured` with device, versions, commit, date and command beside it.

    packages: distributions whose versions matter. device: the processor, unless named. commit: that of the checkout, unless
    named because what was measured is a copy without its history.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device or cpu_name(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "commit": commit or checkout_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
    }
    text = json.dumps({**about, **measured}, indent=2)
    # A list of numbers is one line, however long: a series has no use for a line each.
    path.write_text(_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def cpu_name() -> str:
    """The processor and how many cores of it may be used."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def checkout_commit() -> str:
    """The commit of the checkout, marked if files that git knows have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name
