"""Processor time of other processes, from /proc. Where there is no /proc, nothing is known."""

import os
from collections.abc import Mapping
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Of /proc/PID/stat, counted from the field after the name, which may hold spaces and parentheses.
_USER, _SYSTEM = 11, 12


def cpu_s(pid: int) -> float | None:
    """Seconds of user and system time of all threads of a process; None if that cannot be known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS_PER_S


class CpuMeter:
    """Processor time of named processes since the meter was made."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._before = {name: cpu_s(pid) for name, pid in pids.items()}

    def read(self) -> dict[str, float]:
        """Seconds by name; without those of which nothing is known."""
        after = {name: cpu_s(pid) for name, pid in self._pids.items()}
        spent = {}
        for name, before in self._before.items():
            now = after[name]
            if before is not None and now is not None:
                spent[name] = now - before
        return spent
