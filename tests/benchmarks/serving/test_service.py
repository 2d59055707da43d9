"""A service that does not start, or ends, is told with the end of its log."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from benchmarks.process import Process, ProcessFailedError
from benchmarks.serving.process_cpu import CpuMeter, cpu_s
from benchmarks.serving.service import RunningService, ServiceOptions, running_service


def test_a_service_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    options = ServiceOptions(tmp_path, tmp_path / "state", data_plane="benchmarks.no_such_plane --x 'a b'")
    with (
        pytest.raises(
            ProcessFailedError, match=r"(?s)no_such_plane ended with exit code 1.*data-plane.log ends with:.*No module"
        ),
        running_service(options),
    ):
        pass


def test_a_plane_that_ends_is_noticed(tmp_path: Path) -> None:
    plane = Process("json.tool", ["--help"], tmp_path / "log")
    with pytest.raises(ProcessFailedError, match=r"(?s)json.tool ended with exit code 0.*usage"):
        asyncio.run(asyncio.wait_for(RunningService("nowhere", {"data_plane": plane}, 0.0).watch(), 30))
    plane.stop()


def test_processor_time_is_that_of_all_threads_since_the_meter_was_made() -> None:
    meter = CpuMeter({"this": os.getpid(), "nobody": 2**22 + 1})
    deadline = time.process_time() + 0.05
    while time.process_time() < deadline:
        pass
    spent = meter.read()
    assert set(spent) == {"this"}
    assert spent["this"] >= 0.02
    assert cpu_s(2**22 + 1) is None
