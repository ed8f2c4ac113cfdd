"""The report's statistics against scipy, printed tables and numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from fedmerge.report.statistics import (
    cliques,
    cluster_bootstrap,
    critical_difference,
    friedman,
    holm,
    not_behind_by,
    paired_interval,
    ranks,
)


def test_the_paired_interval_is_that_of_the_t_test() -> None:
    gaps = [0.02, 0.05, -0.01, 0.03]
    wanted = stats.ttest_1samp(gaps, 0.0)
    got = paired_interval(gaps)
    low, high = wanted.confidence_interval(0.95)
    assert (got.mean, got.low, got.high, got.p) == pytest.approx((0.0225, low, high, wanted.pvalue))
    assert got.n == 4
    assert not got.constant
    narrow = paired_interval(gaps, level=0.8)
    low, high = wanted.confidence_interval(0.8)
    assert (narrow.low, narrow.high) == pytest.approx((low, high))


def test_an_interval_of_differences_that_do_not_vary_or_are_too_few() -> None:
    same = paired_interval([0.1, 0.1 + 1e-17, 0.1])
    assert (same.low, same.high, same.p, same.constant) == (same.mean, same.mean, 0.0, True)
    assert paired_interval([0.0, 0.0]).p == 1.0
    one = paired_interval([0.3])
    assert (one.mean, one.low, one.p, one.n) == (0.3, None, None, 1)
    assert math.isnan(paired_interval([]).mean)
    diverged = paired_interval([0.1, math.inf])
    assert (diverged.p, diverged.n) == (None, 2)


def test_not_behind_by_a_margin_is_a_one_sided_test() -> None:
    behind = [0.001, 0.003, 0.002, 0.0025]
    wanted = stats.ttest_1samp(behind, 0.01, alternative="less").pvalue
    assert not_behind_by(paired_interval(behind), 0.01) == pytest.approx(wanted)
    assert wanted < 0.01
    far = not_behind_by(paired_interval([0.02, 0.03, 0.025]), 0.01)
    assert far is not None
    assert far > 0.9
    assert not_behind_by(paired_interval([0.005])) is None
    assert not_behind_by(paired_interval([0.005, 0.005])) == 0.0
    assert not_behind_by(paired_interval([0.05, 0.05])) == 1.0


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    # Sorted .01 .02 .03 .9: times 4, 3, 2, 1 is .04 .06 .06 .9.
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    # .02 * 3 = .06, then .025 * 2 = .05, which may not be less than the one before.
    assert holm([0.02, 0.025, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_two_stage_bootstrap_respects_that_clients_of_a_seed_are_alike() -> None:
    rng = np.random.default_rng(1)
    # All of the variance is between seeds: clients add nothing.
    levels = np.array([0.0, 0.1, 0.2, 0.3])
    alike = [np.full(50, level) for level in levels]
    got = cluster_bootstrap(alike)
    assert got.mean == pytest.approx(0.15)
    # 256 equally likely draws of four seeds: the quantiles of their means are known.
    grid = np.array(np.meshgrid(*[levels] * 4)).reshape(4, -1).mean(0)
    low, high = np.quantile(grid, [0.025, 0.975])
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.026)
    # Taken for 200 independent clients, the interval would be four times as narrow.
    naive = 1.96 * np.concatenate(alike).std() / math.sqrt(200)
    assert got.high is not None
    assert got.high - got.mean > 4 * naive
    # All of the variance is between clients: as many independent numbers.
    apart = [rng.permutation(np.linspace(-1, 1, 40)) for _ in range(5)]
    spread = cluster_bootstrap(apart)
    error = np.linspace(-1, 1, 40).std() / math.sqrt(200)
    assert spread.high == pytest.approx(1.96 * error, rel=0.12)


def test_the_bootstrap_repeats_and_leaves_out_what_is_not_finite() -> None:
    groups = [np.array([0.1, 0.2, np.nan]), np.array([np.nan]), np.array([0.3, 0.4])]
    got = cluster_bootstrap(groups)
    assert got == cluster_bootstrap(groups)
    assert (got.mean, got.n, got.p) == (pytest.approx(0.25), 2, None)
    assert math.isnan(cluster_bootstrap([np.array([])]).mean)


def test_ranks_share_ties() -> None:
    values = np.array([[0.9, 0.8, 0.8, 0.1], [0.5, 0.7, 0.6, 0.2], [0.9, 0.7, 0.8, 0.3]])
    got = ranks(values)
    assert got.tolist() == [[1, 2.5, 2.5, 4], [3, 1, 2, 4], [1, 3, 2, 4]]
    assert ranks(values, -1)[0].tolist() == [4, 2.5, 2.5, 1]
    assert friedman(got[:1]) is None
    assert friedman(got[:, :2]) is None


def test_friedman_is_exact_for_few_settings_and_agrees_with_its_distribution_for_many() -> None:
    # Two settings rank three methods alike by chance in one of six deals.
    assert friedman(np.array([[1.0, 2, 3], [1, 2, 3]])) == pytest.approx(1 / 6, abs=0.015)
    # The 36 deals of two further settings, one by one.
    rows = np.array([[1.0, 2, 3], [1, 2, 3], [3, 1, 2]])
    spread = [
        sum((a + b + c - 6) ** 2 for a, b, c in zip(rows[0], second, third, strict=True))
        for second in permutations((1, 2, 3))
        for third in permutations((1, 2, 3))
    ]
    found = ((rows.sum(0) - 6) ** 2).sum()
    exact = sum(value >= found for value in spread) / 36
    assert friedman(rows) == pytest.approx(exact, abs=0.015)
    values = np.random.default_rng(0).random((40, 5)) + 0.02 * np.arange(5)
    many = ranks(values)
    chi = stats.friedmanchisquare(*values.T)
    assert 0.01 < chi.pvalue < 0.5
    assert friedman(many) == pytest.approx(chi.pvalue, abs=0.02)
    assert friedman(many) == friedman(many)
    assert friedman(np.tile([1.0, 2, 3, 4], (9, 1))) == 1e-4
    assert friedman(np.full((3, 3), 2.0)) == 1.0


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_that_of_the_printed_table(k: int, q: float) -> None:
    # Demsar (2006), table 5(a): q for 0.05.
    assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / 84), abs=1e-3)


def test_cliques_are_the_longest_runs_within_the_difference() -> None:
    assert cliques([1.0, 1.5, 2.4, 4.0, 4.5], 1.0) == [(0, 1), (1, 2), (3, 4)]
    assert cliques([1.0, 1.1, 1.2], 1.0) == [(0, 2)]
    assert cliques([1.0, 3.0], 1.0) == []
    assert cliques([], 1.0) == []
