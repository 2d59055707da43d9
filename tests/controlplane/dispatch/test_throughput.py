"""Tokens per second over a sliding window."""

from controlplane.dispatch.throughput import ThroughputMeter


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    meter = ThroughputMeter(now=1000.0)
    for second in range(1000, 1030):
        meter.add(50, second + 0.25)
        meter.add(50, second + 0.75)
    assert meter.rate(1029.9) == 100.0
    assert meter.rate(1034.9) == 50.0
    assert meter.rate(1050.0) == 0.0


def test_a_young_service_is_not_averaged_over_time_before_it_started() -> None:
    meter = ThroughputMeter(now=1000.0)
    meter.add(30, 1001.0)
    assert meter.rate(1002.0) == 15.0
    assert ThroughputMeter(now=1000.0).rate(1000.0) == 0.0
