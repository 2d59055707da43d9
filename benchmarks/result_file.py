"""Writes what a benchmark measured as JSON under benchmarks/results/, with everything needed to judge it later."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_NUMBERS = re.compile(r"\[([\s\d.,eE+-]+)\]")
# Where a result goes, where things lie meanwhile and of what commit they are says nothing of what was measured. The last two may
# hold credentials, and results are published.
_NOT_OF_THE_COMMAND = ("--out", "--commit", "--state-dir", "--dir", "--token", "--openai-extra")
RESULTS = Path(__file__).resolve().parent / "results"


def write_result(
    path: Path,
    measured: Mapping[str, object],
    packages: Iterable[str],
    *,
    device: str | None = None,
    commit: str | None = None,
) -> None:
    """Writes `measured` with device, versions, commit, date and command beside it.

    packages: distributions whose versions matter, if they are there. device: the processor, unless named. commit: that of the
    checkout, unless named because what was measured is a copy without its history.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device or cpu_name(),
        "versions": {"python": platform.python_version(), **_versions(packages)},
        "commit": commit or checkout_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", _module_name(), *_arguments(sys.argv[1:])]),
    }
    text = json.dumps({**about, **measured}, indent=2)
    # A list of numbers is one line, however long: a series has no use for a line each.
    path.write_text(_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


class ResultFile:
    """A result that is written after each of its parts: what fails later, or is cut off, loses nothing that was measured."""

    def __init__(self, path: Path, packages: Sequence[str], *, device: str | None = None, commit: str | None = None) -> None:
        self._write = partial(write_result, path, packages=packages, device=device, commit=commit)
        self.measured: dict[str, Any] = {}
        self.failed: dict[str, str] = {}

    def add(self, name: str, measure: Callable[[], Mapping[str, object]]) -> bool:
        """Takes in what a part measures and writes the file; a part that fails is told there, and False."""
        try:
            self.measured |= measure()
        except Exception as error:  # whatever it is, the other parts go on
            traceback.print_exc()
            self.failed[name] = f"{type(error).__name__}: {error}"
        self._write(self.measured | ({"failed": self.failed} if self.failed else {}))
        return name not in self.failed


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


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _arguments(argv: Sequence[str]) -> list[str]:
    """Without those that say nothing of what was measured."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag not in _NOT_OF_THE_COMMAND:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name
