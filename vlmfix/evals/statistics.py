"""Paired statistics: bootstrap intervals over units, McNemar's test, Holm's correction.

A unit, usually a picture with every question about it, is what is drawn with replacement. Questions about one picture
are not independent, so drawing questions would give intervals that are too narrow; and every arm sees the same draws,
so what makes a picture hard for all arms cancels in their differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vlmfix.evals.task import Numbers, Tally

LEVEL = 0.95
"""Share of the draws that an interval holds."""
UNDEFINED = 0.05
"""Largest share of draws without a value with which an interval is still given."""
EXACT_BELOW = 25
"""Number of discordant pairs from which McNemar's test takes the chi-square distribution."""
CHUNK = 1 << 20
"""Drawn units held at a time; bounds the memory (about 24 bytes each), and does not change the draws."""

Figures = Callable[[Mapping[str, Numbers]], Mapping[str, Numbers]]
"""Sums of counts to figures, both of any one shape: ``Task.figures``."""


def bootstrap(
    figures: Figures, tallies: Mapping[str, Tally], *, draws: int, seed: int
) -> dict[str, dict[str, Numbers]]:
    """Draw units with replacement, the same ones for every arm, and compute each arm's figures of every draw.

    This is the cluster bootstrap (Davison and Hinkley 1997, *Bootstrap Methods and their Application*, section 3.8,
    strategy 1), paired over the arms. The difference of two arms' figures, draw by draw, is the bootstrap distribution
    of their difference.

    Args:
        figures: Turns sums of counts into figures.
        tallies: Counts by unit of each arm; a unit or a count that one of them lacks is zero there.
        draws: R, how often U units are drawn out of U.
        seed: The same seed, R and U give the same draws.

    Returns:
        For each arm its figures, each of shape (R,); NaN in a draw in which the figure has no value.
    """
    units = dict.fromkeys(unit for tally in tallies.values() for unit in tally.units)
    place = {unit: number for number, unit in enumerate(units)}
    names = list(dict.fromkeys(name for tally in tallies.values() for name in tally.counts))
    counts = np.zeros((len(units), len(tallies), len(names)))  # (U, arms, counts)
    for arm, tally in enumerate(tallies.values()):
        rows = [place[unit] for unit in tally.units]
        for name, values in tally.counts.items():
            counts[rows, arm, names.index(name)] = values
    flat = counts.reshape(len(units), -1)  # (U, arms * counts)
    sums = np.concatenate([times @ flat for times in _times_drawn(len(units), draws, seed)])  # (R, arms * counts)
    sums = sums.reshape(draws, len(tallies), len(names))  # (R, arms, counts)
    return {
        arm: dict(figures({name: sums[:, number, column] for column, name in enumerate(names)}))
        for number, arm in enumerate(tallies)
    }


def _times_drawn(units: int, draws: int, seed: int) -> Iterator[Numbers]:
    """How often each unit is in each draw, (r, U) for r draws at a time."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // units)
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        drawn = generator.integers(units, size=(count, units))  # (r, U)
        drawn += np.arange(count)[:, None] * units
        yield np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)  # (r, U)


def interval(drawn: Numbers) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws.

    It is that of Efron and Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13. Draws in which the figure
    has no value are left out. When they are more than one in twenty, what is left is no longer a sample of the figure's
    distribution, and no interval is given. A figure that is the same in every unit has an interval without width: the
    draws know nothing of what was never seen.

    Args:
        drawn: The figure, or a difference of figures, in each draw, (R,).

    Returns:
        Low and high end; both NaN where no interval is given.
    """
    kept = _with_value(drawn)
    if kept is None:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def bootstrap_p(differences: Numbers) -> float:
    """Two-sided p value of no difference: the level at which the percentile interval just touches zero.

    It is 2 (1 + k) / (R + 1), at most 1, where k draws lie on the rarer side of zero or on zero itself (Efron and
    Tibshirani 1993, section 15.4). It therefore says the same as the interval, and is as approximate: with few units
    both are too optimistic. It is never below 2 / (R + 1).

    Args:
        differences: The difference in each draw, (R,).

    Returns:
        The p value; NaN where :func:`interval` gives none.
    """
    kept = _with_value(differences)
    if kept is None:
        return float("nan")
    rarer = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
    return min(1.0, 2 * (1 + rarer) / (kept.size + 1))


def _with_value(drawn: Numbers) -> Numbers | None:
    """Draws that have a value, unless too many have none."""
    kept = drawn[np.isfinite(drawn)]
    return None if kept.size == 0 or kept.size < (1 - UNDEFINED) * drawn.size else kept


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's test.

    Attributes:
        gained: Samples that only the arm has right.
        lost: Samples that only the plain arm has right.
        p: Two-sided p value.
        exact: True for the binomial distribution, False for the chi-square distribution.
    """

    gained: int
    lost: int
    p: float
    exact: bool


def mcnemar(plain: Sequence[bool], arm: Sequence[bool]) -> McNemar:
    """Test whether two arms are right equally often on the same samples (McNemar 1947, Psychometrika 12).

    Only discordant pairs count: d of them, whose gains and losses differ by g. Below d = 25 the p value is that of the
    exact binomial test with probability 1/2; from there on that of chi-square with one degree of freedom at
    max(0, g - 1)^2 / d, which has Edwards' continuity correction (1948, Psychometrika 13). Samples are taken to be
    independent; where several share a picture, read it together with the bootstrap interval.

    Args:
        plain: Outcomes of the plain arm.
        arm: Outcomes of the other arm on the same samples in the same order.
    """
    pairs = list(zip(plain, arm, strict=True))
    gained = sum(after and not before for before, after in pairs)
    lost = sum(before and not after for before, after in pairs)
    discordant = gained + lost
    if discordant == 0:
        return McNemar(gained, lost, 1.0, exact=True)
    if discordant < EXACT_BELOW:
        return McNemar(gained, lost, float(stats.binomtest(gained, discordant).pvalue), exact=True)
    statistic = max(0, abs(gained - lost) - 1) ** 2 / discordant
    return McNemar(gained, lost, float(stats.chi2.sf(statistic, df=1)), exact=False)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm 1979, Scandinavian Journal of Statistics 6).

    The chance of any false alarm in the family then stays below the level that is asked for. The k-th smallest of m
    is multiplied by m - k + 1; a corrected value is never below that of a smaller one, nor above 1.

    Args:
        p_values: The p values of one family, in any order.

    Returns:
        The corrected values in the same order.
    """
    count, worst = len(p_values), 0.0
    corrected = [0.0] * count
    for rank, index in enumerate(sorted(range(count), key=lambda number: p_values[number])):
        worst = max(worst, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = worst
    return corrected
