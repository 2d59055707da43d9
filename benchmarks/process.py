"""Python processes of this repository with a log each: started, waited for by a word in the log, stopped. Knows no service."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
POLL_S = 0.05
STOP_TIMEOUT_S = 30.0
_TAIL_LINES = 25
# Lines of a data plane that say how far it is; they tell nothing of what went wrong.
_PROGRESS = '"event": "loading"'


class ProcessFailedError(RuntimeError):
    """A process has ended or did not start; the message ends with the tail of its log."""


class Process:
    """One module that runs, and its log."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self._module = module
        self._log = log
        with log.open("wb") as out:
            # A group of its own: Ctrl-C is for the benchmark, which stops things in order.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", module, *arguments],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                process_group=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
            )
        self.pid = self._process.pid

    def wait_for_word(self, word: str, deadline: float) -> None:
        """Until the word stands in the log."""
        while word not in self._log.read_text(errors="replace"):
            self.check(deadline)
            time.sleep(POLL_S)

    def check(self, deadline: float = math.inf) -> None:
        """Raises ProcessFailedError when it has ended or its time is up."""
        if self._process.poll() is not None:
            raise ProcessFailedError(f"{self._module} ended with exit code {self._process.returncode}.\n{self._tail()}")
        if time.monotonic() > deadline:
            raise ProcessFailedError(f"{self._module} has not started in time.\n{self._tail()}")

    def stop(self) -> None:
        """Asks it to end, and kills it when it does not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if _PROGRESS not in line]
        return "\n".join([f"{self._log} ends with:", *lines[-_TAIL_LINES:]])


@contextlib.contextmanager
def running(module: str, arguments: Sequence[str], log: Path) -> Iterator[Process]:
    """A process, for as long as the context is open."""
    process = Process(module, arguments, log)
    try:
        yield process
    finally:
        process.stop()
