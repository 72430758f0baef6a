"""Statistics that compare losses: visible arithmetic, and what the intervals promise."""

import math

import numpy as np
import pytest
from scipy import stats

from afl_jax import comparison

NAN = math.nan


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.2 times 4, 3, 2, 1; never less than the one before.
    adjusted = comparison.holm([0.03, 0.01, 0.2, 0.02])
    assert adjusted == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert comparison.holm([0.9, 0.6]) == [1.0, 1.0]
    assert comparison.holm([]) == []


def test_a_paired_test_by_hand():
    # Differences 1, -2, 3, 4 have ranks 1 to 4: (1 + 3 + 4 - 2) / 10; the NaN case is left out.
    values = {"a": [[0.0, 0.0, 0.0, 0.0, 0.5]], "b": [[1.0, -2.0, 3.0, 4.0, NAN]]}
    (test,) = comparison.paired_tests(values, reference="a").values()
    assert test.difference == pytest.approx((1 - 2 + 3 + 4) / 4)
    assert test.effect_size == pytest.approx(6 / 10)
    assert test.count == 4
    assert test.p_value == test.p_holm == stats.wilcoxon([1, -2, 3, 4]).pvalue


def test_seeds_are_averaged_before_the_test():
    """Two seeds that cancel are no difference, and no evidence."""
    values = {"a": np.zeros((2, 3)), "b": np.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])}
    assert comparison.paired_tests(values, reference="a")["b"] == (0.0, 1.0, 1.0, 0.0, 3)


def test_p_values_are_adjusted_for_their_number():
    rng = np.random.default_rng(0)
    base = rng.random((2, 20))
    values = {"a": base, "b": base + 0.1, "c": base + rng.normal(0, 0.1, (2, 20))}
    tests = comparison.paired_tests(values, reference="a")
    assert tests["b"].p_holm == pytest.approx(2 * tests["b"].p_value)
    assert tests["b"].effect_size == 1.0


def test_ranks_and_wins_by_hand():
    # Case 0: a, b, c; case 1: a and b tie; case 2 is not defined for c.
    values = {"a": [[3.0, 2.0, 9.0]], "b": [[2.0, 2.0, 1.0]], "c": [[1.0, 0.0, NAN]]}
    assert comparison.mean_ranks(values) == {"a": (1 + 1.5) / 2, "b": (2 + 1.5) / 2, "c": 3.0}
    assert comparison.wins(values) == {"a": 1.5, "b": 0.5, "c": 0.0}
    none = {"a": [[NAN]], "b": [[1.0]]}
    assert all(math.isnan(rank) for rank in comparison.mean_ranks(none).values())
    assert comparison.wins(none) == {"a": 0.0, "b": 0.0}


def test_mean_over_seeds_leaves_out_what_is_not_defined():
    means = comparison.mean_over_seeds([[1.0, NAN, NAN], [3.0, 4.0, NAN]])
    np.testing.assert_array_equal(means, [2.0, 4.0, NAN])


def test_the_interval_holds_both_kinds_of_spread():
    rng = np.random.default_rng(0)
    seeds, cases = rng.normal(0, 1, (8, 1)), rng.normal(0, 1, (1, 200))
    of_cases = np.ptp(comparison.crossed_interval(np.broadcast_to(cases, (8, 200))))
    of_both = np.ptp(comparison.crossed_interval(seeds + cases))
    variances = seeds.var() / 8, cases.var() / 200
    assert of_cases == pytest.approx(2 * 1.96 * math.sqrt(variances[1]), rel=0.1)
    assert of_both == pytest.approx(2 * 1.96 * math.sqrt(sum(variances)), rel=0.1)


def test_the_interval_leaves_out_what_is_not_defined():
    values = np.random.default_rng(0).random((3, 30))
    padded = np.concatenate([values, np.full((3, 5), NAN)], axis=1)
    assert comparison.crossed_interval(padded) == comparison.crossed_interval(values)
    assert all(math.isnan(bound) for bound in comparison.crossed_interval([[1.0, NAN]]))
    low, high = comparison.crossed_interval([[0.5, 0.5, NAN], [0.5, NAN, 0.5]])
    assert low == high == 0.5
