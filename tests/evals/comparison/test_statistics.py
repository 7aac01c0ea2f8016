from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from vlmfix.evals.comparison import statistics
from vlmfix.evals.comparison.statistics import bootstrap, interval, swap_test
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
    drawn[:2] = np.nan
    assert np.isnan(interval(drawn)).all()


def swapped(plain, arm, *, figures=mean, draws=4096, seed=0):
    """P values by figure of two arms, whose values are sums of units."""
    return swap_test(figures, tally(plain), tally(arm), list(figures(tally(plain).sums())), draws=draws, seed=seed)


def several(names):
    """As many figures as names, each the mean of a count of its own."""
    return lambda sums: {name: ratio(sums[name], sums["n"]) for name in names}


def both(**values):
    """Two tallies of the same units by the names of their counts: what the plain arm has, and what the other."""
    length = len(next(iter(values.values()))[0])
    return tuple(
        Tally(
            tuple(map(str, range(length))),
            {"n": np.ones(length)} | {name: np.asarray(pair[side], dtype=float) for name, pair in values.items()},
        )
        for side in (0, 1)
    )


def test_one_outcome_in_every_unit_is_tested_as_by_mcnemars_exact_test():
    plain = [1] * 50 + [0] * 30 + [1] * 2 + [0] * 9
    arm = [1] * 50 + [0] * 30 + [0] * 2 + [1] * 9
    expected = stats.binomtest(2, 11, 0.5).pvalue
    assert swapped(plain, arm)["mean"].p == pytest.approx(expected)
    assert swapped(arm, plain)["mean"].p == pytest.approx(expected)
    assert swapped(plain, arm, draws=2000)["mean"].p == pytest.approx(expected, abs=0.02), "2048 swaps are too many"
    assert swapped(plain, plain)["mean"].p == 1


@pytest.mark.parametrize("units", [1, 2, 6, 10])
def test_a_handful_of_units_has_no_small_p_value(units):
    """Whatever happened in them: there are 2^n swaps, and two of them are as large as the largest."""
    found = swapped(np.zeros(units), np.arange(1, units + 1))["mean"]
    assert found.p == found.corrected == 2 / 2**units


def test_what_questions_about_one_picture_share_is_no_evidence():
    """Ten questions about each of eight pictures, right or wrong together: that is eight outcomes, not eighty."""
    found = swapped(np.zeros(8), np.array([10.0] * 7 + [0.0]))
    assert found["mean"].p == pytest.approx(2 / 2**7)


def test_p_values_are_small_as_often_as_they_say_for_a_figure_that_is_no_mean():
    """Pairs of counts whose ratio is the figure; 5 % of 400 is 20, give or take 4."""
    generator, small = np.random.default_rng(9), 0
    for number in range(400):
        hits, size = generator.poisson(2, size=(2, 12)), generator.poisson(4, size=(2, 12)) + 1
        plain, arm = both(hits=hits, size=size)
        found = swap_test(
            lambda sums: {"share": ratio(sums["hits"], sums["size"])}, plain, arm, ["share"], draws=200, seed=number
        )
        small += found["share"].p <= 0.05
    assert 8 <= small <= 32


def test_figures_are_corrected_for_what_they_do_not_share():
    generator = np.random.default_rng(2)
    gain, none = generator.normal(0.4, 1, size=40), np.zeros(40)
    alone = swap_test(several(["a"]), *both(a=(none, gain)), ["a"], draws=4000, seed=1)["a"]
    assert alone.corrected == alone.p
    same = {name: (none, gain) for name in "abcdef"}
    found = swap_test(several("abcdef"), *both(**same), list("abcdef"), draws=4000, seed=1)
    assert {figure.corrected for figure in found.values()} == {alone.p}, "six times the same costs nothing"
    noise = {name: generator.normal(size=(2, 40)) for name in "bcdef"}
    found = swap_test(several("abcdef"), *both(a=(none, gain), **noise), list("abcdef"), draws=4000, seed=1)
    assert alone.p < found["a"].corrected <= 6 * found["a"].p
    assert found["a"].corrected == pytest.approx(1 - (1 - found["a"].p) ** 6, rel=0.25)


def test_the_second_largest_is_compared_with_those_that_are_left():
    """By hand: one figure differs in all of six units, one in five; the first alone is compared with both."""
    one, other = both(a=(np.zeros(6), np.ones(6)), b=(np.zeros(6), [1, 1, 1, 1, 1, 0]))
    found = swap_test(several("ab"), one, other, ["a", "b"], draws=100, seed=0)
    assert (found["a"].p, found["b"].p) == (2 / 64, 4 / 64)
    assert found["a"].corrected == 2 / 64, "sizes are counted in spreads, in which six are more than five"
    assert found["b"].corrected == 4 / 64


def test_false_alarms_among_many_figures_are_as_rare_as_among_one():
    generator, alarms = np.random.default_rng(5), 0
    names = list("abcdefgh")
    for number in range(200):
        values = {name: generator.normal(size=(2, 20)) for name in names}
        found = swap_test(several(names), *both(**values), names, draws=300, seed=number)
        alarms += any(figure.corrected <= 0.05 for figure in found.values())
    assert 3 <= alarms <= 19  # 5 % of 200 is 10, give or take 3


def test_a_figure_without_a_value_is_not_tested_and_one_that_can_lose_its_value_is_harder_to_tell():
    figures = lambda sums: {"share": ratio(sums["hits"], sums["size"]), "n": sums["n"]}  # noqa: E731
    plain, arm = both(hits=([0, 0], [1, 1]), size=([0, 0], [1, 1]))
    assert swap_test(figures, plain, arm, [], draws=100, seed=0) == {}
    assert list(swap_test(figures, plain, arm, ["share", "n"], draws=100, seed=0)) == ["n"]
    plain, arm = both(hits=([1, 0, 0, 0], [1, 1, 1, 1]), size=([1, 0, 0, 0], [1, 1, 1, 1]))
    assert swap_test(figures, plain, arm, ["share"], draws=100, seed=0)["share"].p == 1


def test_what_no_swap_changes_is_no_difference_however_it_is_rounded():
    figures = lambda sums: {"sum": (sums["a"] + 0.1) + 0.2 - sums["b"], "b": sums["b"]}  # noqa: E731
    plain, arm = both(a=([0.1, 0.7], [0.7, 0.1]), b=([0.3, 1.0], [1.0, 0.3]))
    assert {found.p for found in swap_test(figures, plain, arm, ["sum", "b"], draws=10, seed=0).values()} == {1}


def test_swaps_are_the_same_from_seed_to_seed_whatever_the_chunks(monkeypatch):
    generator = np.random.default_rng(7)
    plain, arm = generator.random((2, 50))
    first = swapped(plain, arm, draws=1001)
    monkeypatch.setattr(statistics, "CHUNK", 333)
    assert swapped(plain, arm, draws=1001) == first
    assert swapped(plain, arm, draws=1001, seed=1) != first


def test_memory_is_bounded_whatever_the_number_of_swaps():
    tracemalloc.start()
    swapped(np.zeros(20_000), np.ones(20_000), draws=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
