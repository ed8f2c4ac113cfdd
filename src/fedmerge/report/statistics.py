"""The tests and intervals of the report, as pure functions of numbers.

It knows no runs, no methods and no settings; what is compared with what is decided in `ranking`
and `overall`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 0.05
MARGIN = 0.01
"""A loss to the best that still counts as not worse: one point of a hundred."""
ENOUGH = 6
"""Seeds under which a paired test can show only large differences."""
DEALS = 9999
"""Deals of ranks by which `friedman` judges."""
_SAME = 1e-12  # rounding alone makes equal differences differ; a t-test would take it for variance


@dataclass(frozen=True)
class Interval:
    """A mean of n differences with its confidence interval and two-sided p against 0.

    low, high, p: None where nothing can be said (fewer than two differences, or one not finite).
    Differences that do not vary have low = high = mean, and p = 0, or 1 where they are 0.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int = 0

    @property
    def constant(self) -> bool:
        """Whether several differences are all the same, so that a test has no noise to judge by."""
        return self.low is not None and self.low == self.high


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Return the t interval of paired `differences`, one for each seed.

    The mean over a seed's clients is one number, so that clients of one seed, which share a
    split and a server, are never counted as independent.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if not n:
        return Interval(float("nan"))
    mean = float(values.mean())
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, n=n)
    if np.ptp(values) <= _SAME:
        return Interval(mean, mean, mean, float(abs(mean) <= _SAME), n)
    from scipy import stats

    error = float(values.std(ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Interval(mean, mean - reach, mean + reach, p, n)


def not_behind_by(behind: Interval, margin: float = MARGIN, level: float = 0.95) -> float | None:
    """Return the one-sided p of "behind by `margin` or more" (a test of non-inferiority).

    behind: the `level` interval of best minus method. A small p shows that the method loses less
    than `margin`; None where nothing can be tested.
    """
    if behind.low is None or behind.high is None:
        return None
    if behind.constant:
        return float(behind.mean >= margin)
    from scipy import stats

    error = (behind.high - behind.mean) / float(stats.t.ppf(0.5 + level / 2, behind.n - 1))
    return float(stats.t.cdf((behind.mean - margin) / error, behind.n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm, 1979), in the same order."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def cluster_bootstrap(
    differences: Sequence[NDArray[np.float64]], draws: int = 2000, level: float = 0.95
) -> Interval:
    """Return a percentile interval of the mean of clients' differences, drawn in two stages.

    differences: for each seed (k,), one number for each client. Each draw takes seeds with
    replacement, then clients within each seed with replacement, and averages the seeds' means;
    so clients of a seed are not taken for independent. The draws are the same at every call.
    With few seeds such an interval is too narrow; p is not given.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in differences]
    groups = [group[np.isfinite(group)] for group in groups]
    groups = [group for group in groups if len(group)]
    if not groups:
        return Interval(float("nan"))
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(groups), (draws, len(groups)))
    means = np.empty(picked.shape)
    for s, group in enumerate(groups):
        at = picked == s
        means[at] = group[rng.integers(0, len(group), (int(at.sum()), len(group)))].mean(1)
    low, high = np.quantile(means.mean(1), [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([group.mean() for group in groups]))
    return Interval(mean, float(low), float(high), None, len(groups))


def ranks(values: NDArray[np.float64], better: int = 1) -> NDArray[np.float64]:
    """Return the ranks (n, k) of k methods in each of n settings: 1 is best, ties share theirs."""
    from scipy import stats

    ranked: NDArray[np.float64] = stats.rankdata(-better * values, axis=1)
    return ranked


def friedman(ranked: NDArray[np.float64]) -> float | None:
    """Return the p of Friedman's test, by permutation: of few settings no distribution is exact.

    The ranks of each setting are dealt anew `DEALS` times, the same at every call; p is the share
    of deals, what was found being one, in which mean ranks differ as much. (A sum of squares, as
    Friedman's statistic is but for a factor that ties change in all deals alike.)

    ranked: (n settings, k methods). The hypothesis is that all methods rank alike; None with fewer
    than two settings or three methods.
    """
    n, k = ranked.shape
    if n < 2 or k < 3:
        return None
    rng = np.random.default_rng(0)
    sums = np.zeros((DEALS, k))
    for row in ranked:
        sums += rng.permuted(np.broadcast_to(row, (DEALS, k)), axis=1)

    def spread(of: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = ((of - n * (k + 1) / 2) ** 2).sum(-1)
        return found

    found = spread(ranked.sum(0)) * (1 - _SAME)
    return (1 + int((spread(sums) >= found).sum())) / (1 + DEALS)


def critical_difference(k: int, n: int) -> float:
    """Return Nemenyi's critical difference of mean ranks of k methods over n settings.

    Two methods whose mean ranks differ by less are not told apart at `SIGNIFICANCE`; see
    J. Demsar, "Statistical comparisons of classifiers over multiple data sets", JMLR 7, 2006.
    """
    from scipy import stats

    q = float(stats.studentized_range.ppf(1 - SIGNIFICANCE, k, np.inf)) / math.sqrt(2)
    return q * math.sqrt(k * (k + 1) / (6 * n))


def cliques(means: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Return (first, last) of each longest run of sorted `means` within `difference` of another.

    Runs of one are left out, and so is a run that lies within another.
    """
    found: list[tuple[int, int]] = []
    for first, low in enumerate(means):
        last = max(i for i, mean in enumerate(means) if mean - low < difference)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found
