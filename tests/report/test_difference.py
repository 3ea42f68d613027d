"""Welch's test and the paired one against SciPy's own."""

import math

import numpy as np
import pytest
import scipy.stats

from kdq.report.difference import difference


@pytest.mark.parametrize("seed", range(20))
def test_it_is_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a = generator.normal(90, generator.uniform(0.1, 3), generator.integers(2, 9))
    b = generator.normal(91, generator.uniform(0.1, 3), generator.integers(2, 9))
    found, wanted = difference(a, b), scipy.stats.ttest_ind(a, b, equal_var=False)
    interval = wanted.confidence_interval(0.95)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (found.p, found.low, found.high) == pytest.approx((wanted.pvalue, interval.low, interval.high))
    assert (found.n_a, found.n_b) == (len(a), len(b))
    assert found.beyond_noise == (wanted.pvalue < 0.05) == (not interval.low < 0 < interval.high)


@pytest.mark.parametrize("seed", range(20))
def test_of_pairs_it_is_scipys_too(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a = generator.normal(90, 3, generator.integers(2, 9))
    b = a + generator.normal(0.3, generator.uniform(0.1, 1), len(a))
    found, wanted = difference(a, b, paired=True), scipy.stats.ttest_rel(a, b)
    interval = wanted.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((wanted.pvalue, interval.low, interval.high))
    assert (found.value, found.n_a, found.n_b) == (pytest.approx(np.mean(a - b)), len(a), len(a))


def test_the_other_way_round_is_the_negative() -> None:
    a, b = difference([1.0, 2.0, 4.0], [5.0, 5.5]), difference([5.0, 5.5], [1.0, 2.0, 4.0])
    assert (a.value, a.low, a.high, a.p) == pytest.approx((-b.value, -b.high, -b.low, b.p))


@pytest.mark.parametrize(("a", "b"), [([90.0], [91.0, 92.0]), ([90.0, 91.0], [92.0]), ([90.1] * 3, [89.7] * 2)])
def test_without_spread_there_is_no_test(a: list[float], b: list[float]) -> None:
    found = difference(a, b)
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert math.isnan(found.p)
    assert math.isnan(found.low)
    assert not found.tested
    assert not found.beyond_noise


def test_pairs_that_differ_by_one_amount_are_not_tested() -> None:
    assert not difference([80.1, 90.7], [80.0, 90.6], paired=True).tested
