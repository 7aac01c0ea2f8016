from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from vlmfix.evals import statistics
from vlmfix.evals.statistics import bootstrap, bootstrap_p, holm, interval, mcnemar
from vlmfix.evals.task import Tally, ratio


def mean(sums):
    return {"mean": ratio(sums["sum"], sums["n"])}


def tally(values, counts=None):
    values = np.asarray(values, dtype=float)
    ones = np.ones(len(values)) if counts is None else np.asarray(counts, dtype=float)
    return Tally(tuple(str(number) for number in range(len(values))), {"sum": values, "n": ones})


def drawn_mean(values, counts=None, *, draws=2000, seed=0):
    return bootstrap(mean, {"arm": tally(values, counts)}, draws=draws, seed=seed)["arm"]["mean"]


def width(drawn):
    low, high = interval(drawn)
    return high - low


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(1).exponential(size=200)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    low, high = interval(drawn_mean(values, draws=20_000))
    tolerance = 0.02 * (expected.high - expected.low)
    assert low == pytest.approx(expected.low, abs=tolerance)
    assert high == pytest.approx(expected.high, abs=tolerance)


def test_intervals_hold_the_truth_nearly_always_when_units_are_clusters():
    """Clusters of five share a chance of being right, 0.6 on average. 95 % of 300 is 285, give or take 4."""
    generator = np.random.default_rng(3)
    held = {"clusters": 0, "samples": 0}
    for repetition in range(300):
        chances = generator.beta(1.2, 0.8, size=60)
        right = generator.random((60, 5)) < chances[:, None]
        by_unit = {"clusters": (right.sum(1), np.full(60, 5)), "samples": (right.ravel(), np.ones(300))}
        for name, (sums, counts) in by_unit.items():
            low, high = interval(drawn_mean(sums, counts, draws=400, seed=repetition))
            held[name] += low <= 0.6 <= high
    assert 273 <= held["clusters"] <= 295
    assert held["samples"] < 260, "samples of one cluster are not independent: their intervals are too narrow"


def test_the_same_draws_for_all_arms_narrow_the_interval_of_a_difference():
    generator = np.random.default_rng(4)
    hard = generator.normal(size=300)
    plain, arm = tally(hard), tally(hard + 0.1 + 0.2 * generator.normal(size=300))
    drawn = bootstrap(mean, {"plain": plain, "arm": arm}, draws=2000, seed=5)
    paired = drawn["arm"]["mean"] - drawn["plain"]["mean"]
    unpaired = drawn["arm"]["mean"] - bootstrap(mean, {"plain": plain}, draws=2000, seed=6)["plain"]["mean"]
    assert width(paired) < 0.25 * width(unpaired)
    assert interval(paired)[0] > 0 > interval(unpaired)[0]


def test_an_arm_that_lacks_units_or_counts_has_zeros_there():
    whole = Tally(("a", "b"), {"sum": np.array([1.0, 0.0]), "n": np.ones(2)})
    part = Tally(("b",), {"n": np.ones(1)})
    drawn = bootstrap(lambda sums: dict(sums), {"whole": whole, "part": part}, draws=500, seed=0)
    assert set(np.unique(drawn["whole"]["sum"])) == {0.0, 1.0, 2.0}
    assert (drawn["part"]["sum"] == 0).all()
    assert (drawn["part"]["n"] + drawn["whole"]["sum"] == 2).all()


def test_seeds_reproduce_whatever_the_chunks(monkeypatch):
    values = np.random.default_rng(7).random(50)
    first = drawn_mean(values, draws=101)
    monkeypatch.setattr(statistics, "CHUNK", 333)
    assert np.allclose(drawn_mean(values, draws=101), first, rtol=1e-12)
    assert not np.allclose(drawn_mean(values, draws=101, seed=1), first)


def test_memory_is_bounded_whatever_the_number_of_draws():
    values = np.ones(20_000)
    tracemalloc.start()
    drawn_mean(values, draws=1000)  # the whole table of draws would hold 160 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_draws_without_a_value_are_left_out_until_they_are_too_many():
    drawn = np.concatenate([np.arange(96.0), np.full(4, np.nan)])
    assert interval(drawn) == pytest.approx((0.025 * 95, 0.975 * 95))
    assert not np.isnan(bootstrap_p(drawn))
    drawn[:2] = np.nan
    assert np.isnan(interval(drawn)).all()
    assert np.isnan(bootstrap_p(drawn))


def test_a_bootstrap_p_agrees_with_the_interval():
    assert bootstrap_p(np.arange(1.0, 1000.0)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.arange(-9.0, 990.0)) == pytest.approx(2 * (1 + 10) / 1000)
    assert bootstrap_p(-np.arange(-9.0, 990.0)) == pytest.approx(2 * (1 + 10) / 1000)
    assert bootstrap_p(np.zeros(1000)) == 1
    for shift in (0.17, 0.23):
        drawn = drawn_mean(np.random.default_rng(8).normal(shift, 1, size=100), draws=9999)
        assert (bootstrap_p(drawn) < 0.05) == (interval(drawn)[0] > 0)


def test_bootstrap_p_values_are_seldom_small_without_a_difference():
    generator = np.random.default_rng(9)
    small = sum(
        bootstrap_p(drawn_mean(generator.normal(size=80), draws=400, seed=number)) < 0.05 for number in range(300)
    )
    assert 4 <= small <= 30


def outcomes(both, lost, gained, neither):
    plain = [True] * (both + lost) + [False] * (gained + neither)
    arm = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return plain, arm


def test_few_discordant_pairs_are_tested_by_the_binomial():
    result = mcnemar(*outcomes(50, 2, 9, 30))
    assert (result.lost, result.gained, result.exact) == (2, 9, True)
    assert result.p == pytest.approx(stats.binomtest(2, 11, 0.5).pvalue)
    assert result.p == pytest.approx(2 * (1 + 11 + 55) / 2**11)  # choose 0, 1 and 2 of 11, on both sides
    assert mcnemar(*outcomes(0, 10, 14, 0)).exact
    assert mcnemar(*outcomes(5, 0, 0, 5)).p == 1


def test_many_discordant_pairs_are_tested_by_chi_square():
    result = mcnemar(*outcomes(500, 5, 20, 100))
    assert not result.exact
    assert result.p == pytest.approx(stats.chi2.sf((20 - 5 - 1) ** 2 / 25, 1))
    assert result.p == pytest.approx(0.0051, abs=1e-4)
    assert mcnemar(*outcomes(0, 20, 20, 0)).p == 1
    many = mcnemar(*outcomes(0, 480, 560, 0))
    assert many.p == pytest.approx(stats.binomtest(480, 1040).pvalue, rel=0.02)


def test_outcomes_must_be_pairs():
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, False], [True])


def test_holm_by_hand():
    # smallest 0.005 * 4; then 0.01 * 3; then 0.03 * 2 and 0.04 * 1, which may not be below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
