"""How much host memory the adapters of a run take."""

from pathlib import Path

import pytest

from benchmarks.model_shapes import geometry_of
from benchmarks.serving.adapters import CACHE_SPARE, AdapterPlan, host_cache_bytes, total_bytes
from benchmarks.workload import SETTINGS

MIB = 1 << 20


@pytest.mark.parametrize(("name", "mean_mib"), [("S1", 16), ("S2", 60), ("S4", 350 / 3), ("S5", 168), ("S6", 640), ("M1", 150)])
def test_adapters_take_what_their_rows_take(name: str, mean_mib: float) -> None:
    setting = SETTINGS[name]
    plan = AdapterPlan(12, setting.ranks, setting.modules)
    assert total_bytes(setting.shape, plan) == pytest.approx(12 * mean_mib * MIB, rel=0.001)
    # The same from the geometry that images are made by.
    shapes = [geometry_of(setting.shape).module(module) for module in setting.modules]
    row_elems = sum(shape.in_features + shape.out_features for shape in shapes if shape is not None)
    rows = sum(setting.ranks) * (12 // len(setting.ranks))
    assert total_bytes(setting.shape, plan) == rows * row_elems * 2 * setting.shape.num_layers


def test_the_host_cache_holds_all_where_there_is_memory_for_it(tmp_path: Path) -> None:
    setting = SETTINGS["S1"]
    plan = AdapterPlan(1000, setting.ranks, setting.modules)
    meminfo = tmp_path / "meminfo"
    for available_gib, expected in ((100, int(CACHE_SPARE * 1000 * 16 * MIB)), (10, 6 << 30)):
        meminfo.write_text(f"MemTotal:  1 kB\nMemAvailable:   {available_gib << 20} kB\n")
        assert host_cache_bytes(setting.shape, plan, meminfo) == expected
    assert host_cache_bytes(setting.shape, plan, tmp_path / "none") == int(CACHE_SPARE * 1000 * 16 * MIB)
    assert host_cache_bytes(setting.shape, AdapterPlan(0)) == 256 * MIB
