"""The scheduler is timed while its batch and its queue are full."""

from benchmarks.scheduling_cost import measure_scheduling


def test_batch_and_queue_are_full_while_the_scheduler_is_timed() -> None:
    found = measure_scheduling(num_running=16, num_waiting=32)
    assert (found["num_running"], found["num_waiting"]) == (16, 32)
    assert 0 < found["p50_ms"] <= found["p99_ms"]
