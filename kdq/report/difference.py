"""How much two groups of seeds differ, and whether that is more than their spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Differences with a smaller p are called more than seed noise.
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """``mean(a) - mean(b)`` with a two-sided t-test, if there is one: its numbers are NaN where a side has fewer than
    two seeds, or there is no spread."""

    value: float
    low: float  # of the 95 % confidence interval
    high: float
    p: float  # of the hypothesis that the means are equal
    n_a: int  # seeds
    n_b: int
    paired: bool = False  # by seed: both sides have the same ones

    @property
    def tested(self) -> bool:
        return not math.isnan(self.p)

    @property
    def beyond_noise(self) -> bool:
        return self.p < LEVEL


def difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, paired: bool = False) -> Difference:
    """Compare two groups, one value per seed; ``paired`` ones have the same seeds in the same order.

    The closed form of ``scipy.stats.ttest_ind(a, b, equal_var=False)``, Welch's test, or of ``ttest_rel(a, b)``, and of
    its confidence interval, which a report over thousands of cells cannot wait for.

    >>> found = difference([3.0, 5.0], [1.0, 1.5])
    >>> found.value, round(found.low, 2), round(found.high, 2), round(found.p, 3)
    (2.75, -7.37, 12.87, 0.205)
    >>> round(difference([3.0, 5.0], [1.0, 2.5], paired=True).p, 3)
    0.07
    """
    from scipy.special import stdtr, stdtrit

    a, b = np.asarray(a, float), np.asarray(b, float)
    value = float(a.mean() - b.mean())
    untested = Difference(value, math.nan, math.nan, math.nan, len(a), len(b), paired)
    if min(len(a), len(b)) < 2:
        return untested
    parts = [group.var(ddof=1) / len(group) for group in ((a - b,) if paired else (a, b))]
    # Equal values leave rounding errors behind, which are no spread.
    if sum(parts) <= (1e-9 * max(1.0, float(np.abs(a).max()), float(np.abs(b).max()))) ** 2:
        return untested
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (a, b), strict=False))
    reach = error * float(stdtrit(freedom, 1 - LEVEL / 2))
    p = 2 * float(stdtr(freedom, -abs(value) / error))
    return Difference(value, value - reach, value + reach, p, len(a), len(b), paired)
