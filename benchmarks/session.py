"""The processes of a session as Linux keeps them: all that its first process started, process groups of their own included, but
for what left for a session of its own. Where there is no /proc, there seem to be none. Knows nothing of what they do.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

_POLL_S = 0.05
# What hangs in a driver cannot be killed, and waiting for it would hang as well.
_KILL_TIMEOUT_S = 30.0
# Of /proc/PID/stat, counted from the field after the name, which may hold spaces and parentheses.
_STATE, _SESSION, _NUM_THREADS = 0, 3, 17


def kill_session(session: int) -> list[int]:
    """Kills what is in it, and returns when that is gone and its memory free, the device's too; or the ids of what still runs
    after 30 s.
    """
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    # Again and again: what is being started just now is not seen yet.
    while (pids := _running(session)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return pids


def _running(session: int) -> list[int]:
    """Process ids, without those that have ended, all threads, and were only not waited for."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            has_ended = fields[_STATE] in "ZX" and int(fields[_NUM_THREADS]) <= 1
            if int(fields[_SESSION]) == session and not has_ended:
                pids.append(int(path.parent.name))
    return pids
