"""Which of several losses is better: the statistics of losses x seeds x cases.

A metric of one loss is an array ``[S, N]``, S seeds and N cases, the same cases in the same order
for every loss; NaN is undefined. The case is the unit of every test: seeds are averaged first,
since ten seeds on one case are no ten cases.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class PairedTest(NamedTuple):
    """One loss against the reference, over the cases in which both are defined.

    Attributes:
        difference: Mean of the loss less the reference.
        p_value: Wilcoxon's signed-rank test, two-sided; 1 if no case differs.
        p_holm: Adjusted by Holm's method for the number of losses compared.
        effect_size: Matched-pairs rank-biserial correlation, from -1 (the reference is better in
            every case) to 1.
        count: Cases.
    """

    difference: float
    p_value: float
    p_holm: float
    effect_size: float
    count: int


def crossed_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, over cases and seeds.

    Both are drawn with replacement, each by itself, since every seed meets every case.

    Args:
        values: ``[S, N]``; NaN is left out of a mean.
        confidence: In (0, 1).
        num_resamples: Number of bootstrap samples.
        seed: The interval is a function of its arguments.

    Returns:
        The bounds; (NaN, NaN) for fewer than two cases that are defined.

    References:
        Owen, The pigeonhole bootstrap, 2007, https://doi.org/10.1214/07-AOAS122
    """
    values = np.asarray(values, np.float64)
    values = values[:, ~np.isnan(values).all(axis=0)]
    num_seeds, num_cases = values.shape
    if num_cases < 2:
        return math.nan, math.nan
    defined, values = ~np.isnan(values), np.nan_to_num(values)
    rng = np.random.default_rng(seed)
    # How often each is drawn, as weights: a mean is then two products.
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)
    cases = rng.multinomial(num_cases, np.full(num_cases, 1 / num_cases), num_resamples)
    totals = np.einsum("rs,sn,rn->r", seeds, values, cases, optimize=True)
    counts = np.einsum("rs,sn,rn->r", seeds, defined, cases, optimize=True)
    means = totals[counts > 0] / counts[counts > 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_tests(values: Mapping[str, ArrayLike], *, reference: str) -> dict[str, PairedTest]:
    r"""Every loss against one, case by case.

    With :math:`W_+` and :math:`W_-` the sums of the ranks of the positive and the negative
    differences, the effect size is :math:`(W_+ - W_-) / (W_+ + W_-)`.

    Args:
        values: Metric of each loss, ``[S, N]``.
        reference: The loss that the others are compared with.

    Returns:
        A test for each of the others.

    References:
        Wilcoxon, Individual Comparisons by Ranking Methods, 1945,
        https://doi.org/10.2307/3001968; Holm, A Simple Sequentially Rejective Multiple Test
        Procedure, 1979; Kerby, The Simple Difference Formula, 2014,
        https://doi.org/10.2466/11.IT.3.1
    """
    means = {name: mean_over_seeds(value) for name, value in values.items()}
    tests = {}
    for name, mean in means.items():
        if name == reference:
            continue
        difference = mean - means[reference]
        difference = difference[~np.isnan(difference)]
        p_value, effect_size = _signed_rank(difference)
        average = float(difference.mean()) if difference.size else math.nan
        tests[name] = PairedTest(average, p_value, math.nan, effect_size, difference.size)
    adjusted = holm([test.p_value for test in tests.values()])
    return {
        name: test._replace(p_holm=p)
        for (name, test), p in zip(tests.items(), adjusted, strict=True)
    }


def _signed_rank(difference: NDArray[np.float64]) -> tuple[float, float]:
    """P-value and effect size; differences of 0 are left out, as Wilcoxon did."""
    from scipy import stats

    difference = difference[difference != 0]
    if not difference.size:
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(difference))
    effect_size = float(np.sum(np.sign(difference) * ranks) / ranks.sum())
    return float(stats.wilcoxon(difference).pvalue), effect_size


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number, by Holm's step-down method.

    Args:
        p_values: One for each test.

    Returns:
        Adjusted p-values in the same order, at most 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = float(largest)
    return adjusted


def mean_ranks(values: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Mean rank of each loss over the cases in which all are defined; 1 is the best.

    Args:
        values: Metric of each loss, ``[S, N]``; larger is better.

    Returns:
        Ranks from 1 to the number of losses, losses that tie sharing theirs; NaN without a case.
    """
    from scipy import stats

    means = _defined_cases(values)
    if not means.shape[1]:
        return dict.fromkeys(values, math.nan)
    ranks = stats.rankdata(-means, axis=0).mean(axis=1)
    return dict(zip(values, ranks.tolist(), strict=True))


def wins(values: Mapping[str, ArrayLike]) -> dict[str, float]:
    """In how many cases each loss is the best of all; those that tie share a case.

    Args:
        values: Metric of each loss, ``[S, N]``; larger is better.

    Returns:
        Numbers that add up to the cases in which all are defined.
    """
    means = _defined_cases(values)
    best = means == means.max(axis=0, initial=-np.inf)
    shares = (best / np.maximum(best.sum(axis=0), 1)).sum(axis=1)
    return dict(zip(values, shares.tolist(), strict=True))


def mean_over_seeds(values: ArrayLike) -> NDArray[np.float64]:
    """Mean of each case over the seeds in which it is defined.

    Args:
        values: ``[S, N]``.

    Returns:
        ``[N]``; NaN where no seed defines it.
    """
    values = np.asarray(values, np.float64)
    count = np.sum(~np.isnan(values), axis=0)
    total = np.nansum(values, axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _defined_cases(values: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    """Means over seeds ``[L, N']`` of the cases in which every loss is defined."""
    means = np.stack([mean_over_seeds(value) for value in values.values()])
    return means[:, ~np.isnan(means).any(axis=0)]
