"""What samples of the service's load say of a run."""

from benchmarks.serving.load_samples import LoadSample, summarize


def sample(t_s: float, num_steps: int, step_s: float, kv_pages: int = 0) -> LoadSample:
    return LoadSample(t_s, kv_pages, 30, 10, 70 - kv_pages, 3, 2, 5, num_steps, step_s)


def test_the_engine_was_busy_for_the_growth_of_its_time_in_steps() -> None:
    summary = summarize([sample(99.9, 100, 4.0), sample(101, 150, 5.0, 20), sample(102.1, 200, 5.5)], 100.0, wall_s=2.0)
    assert (summary["num_steps"], summary["mean_step_s"], summary["engine_busy_share"]) == (100, 0.015, 0.75)
    assert summary["num_resident_before"] == 5
    columns = summary["samples"]
    assert columns["t_s"] == [-0.1, 1.0, 2.1]
    assert (columns["kv_pages"], columns["idle_adapter_pages"]) == ([0, 20, 0], [10, 10, 10])


def test_a_long_run_keeps_so_many_samples_and_no_more() -> None:
    samples = [sample(float(t), t, 0.0) for t in range(1000)]
    columns = summarize(samples, 0.0, wall_s=999.0, max_samples=300)["samples"]
    assert columns["t_s"][:3] == [0.0, 4.0, 8.0]
    assert len(columns["t_s"]) == 250


def test_an_idle_engine_has_no_step_time() -> None:
    summary = summarize([sample(0.0, 7, 1.0), sample(1.0, 7, 1.0)], 0.0, wall_s=1.0)
    assert (summary["mean_step_s"], summary["engine_busy_share"]) == (0.0, 0.0)
