"""What counts as agreement of two runs, on answers made by hand."""

import math

import pytest

from benchmarks.soak.agreement import compare
from benchmarks.soak.clients import Answer


def test_equal_tokens_are_compared_to_the_end_and_by_how_far_the_best_leads() -> None:
    first = Answer([5, 7], [{5: -1.0, 6: -1.5}, {7: -0.5, 8: -2.0}])
    second = Answer([5, 7], [{5: -1.1, 6: -1.5}, {7: -0.5, 8: -1.75}])
    agreement = compare([(first, second)])
    assert (agreement.num_equal, agreement.max_at_difference) == (1, 0.0)
    assert agreement.shifts == pytest.approx((0.1, 0.25))


def test_nothing_is_compared_behind_the_first_token_that_differs() -> None:
    first = Answer([5, 7, 1], [{5: -1.0, 6: -1.1}, {7: -0.5, 8: -0.7}, {1: 0.0, 2: -9.0}])
    second = Answer([5, 8, 2], [{5: -1.0, 6: -1.1}, {8: -0.6, 7: -0.9}, {2: 0.0, 1: -9.0}])
    agreement = compare([(first, second)])
    assert agreement.num_equal == 0
    assert agreement.shifts == pytest.approx((0.0, 0.5))
    assert agreement.shifts_at_difference == pytest.approx((0.5,)), "one run prefers 7 by 0.2, the other 8 by 0.3"


def test_a_token_that_one_run_does_not_name_counts_as_its_least_likely() -> None:
    agreement = compare([(Answer([5], [{5: -1.0, 6: -2.0}]), Answer([9], [{9: -1.0, 8: -4.0}]))])
    assert agreement.max_at_difference == pytest.approx(1.0 + 3.0)


def test_a_difference_without_logprobs_is_never_within_any_spread() -> None:
    assert compare([(Answer([5]), Answer([9]))]).max_at_difference == math.inf
