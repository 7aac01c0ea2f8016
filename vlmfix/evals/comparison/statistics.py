"""Paired statistics over units: bootstrap intervals, and tests that swap what two arms gave.

A unit, usually a picture with every question about it, is what is drawn with replacement, and what is swapped.
Questions about one picture are not independent, so taking them by themselves would find differences where there are
none; and every arm sees the same draws, so what makes a picture hard for all arms cancels in their differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmfix.evals.task import Numbers, Tally

LEVEL = 0.95
"""Share of the draws that an interval holds."""
UNDEFINED = 0.05
"""Largest share of draws without a value with which an interval is still given."""
ROUNDING = 1e-9
"""Relative; two differences that are so near are equal."""
NOTHING = 1e-12
"""A spread that is no larger is rounding."""
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
    counts, names = _counts(tallies)
    flat = counts.reshape(len(counts), -1)  # (U, arms * counts)
    sums = np.concatenate([times @ flat for times in _times_drawn(len(counts), draws, seed)])  # (R, arms * counts)
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


def _with_value(drawn: Numbers) -> Numbers | None:
    """Draws that have a value, unless too many have none."""
    kept = drawn[np.isfinite(drawn)]
    return None if kept.size == 0 or kept.size < (1 - UNDEFINED) * drawn.size else kept


@dataclass(frozen=True)
class Tested:
    """Two-sided p values of no difference.

    Attributes:
        p: Of the figure by itself.
        corrected: Corrected for all figures that were tested together.
    """

    p: float
    corrected: float


def swap_test(
    figures: Figures, plain: Tally, arm: Tally, names: Sequence[str], *, draws: int, seed: int
) -> dict[str, Tested]:
    """Test whether two arms differ, by swapping their results in units that are chosen by chance.

    Where the arms do not differ, it is chance which of a unit's two results is whose. The p value of a figure is the
    share of swaps after which its difference is at least as large, to either side, as it was measured (Edgington and
    Onghena 2007, *Randomization Tests*, chapter 5). That holds for any figure and any number of units, whatever
    questions about one picture have in common; with one yes or no in every unit it is McNemar's exact test. Units in
    which both arms have the same counts tell nothing. With d others there are 2^d swaps, all of which are looked at
    when they are no more than ``draws``, so that no p value is below 2 / 2^d.

    The correction is Westfall and Young's (1993, *Resampling-Based Multiple Testing*, section 2.8): every difference
    is divided by its spread over the swaps, and the largest of a swap is compared with the largest that was measured,
    then the largest but one with those that are left, and so on. The chance of any false alarm among the figures is the
    level that is asked for, and figures that say nearly the same cost nearly nothing.

    Args:
        figures: Turns sums of counts into figures.
        plain: Counts by unit of the plain arm.
        arm: Counts by unit of the other arm; a unit or a count that one of them lacks is zero there.
        names: The figures to test together.
        draws: The largest number of swaps that are looked at; the first of them swaps nothing.
        seed: Of the swaps.

    Returns:
        The p values by figure; a figure without a value in one of the arms is left out. A swap after which a figure has
        no value counts against a difference.
    """
    if not names:
        return {}
    counts, known = _counts({"plain": plain, "arm": arm})  # (U, 2, counts)
    changed = counts[:, 1] - counts[:, 0]
    changed = changed[changed.any(axis=1)]  # (d, counts)
    before, after = counts.sum(axis=0)
    parts = []
    for swapped in _swaps(len(changed), draws, seed):
        moved = swapped @ changed  # (r, counts)
        former, latter = (
            figures({name: sums[:, column] for column, name in enumerate(known)})
            for sums in (before + moved, after - moved)
        )
        parts.append(np.stack([latter[name] - former[name] for name in names], axis=1))  # (r, F)
    differences = np.concatenate(parts)  # (R, F)
    there = np.flatnonzero(np.isfinite(differences[0]))
    sizes = _sizes(differences[:, there])
    reached = sizes >= sizes[0] * (1 - ROUNDING)
    corrected = _stepped_down(sizes)
    return {
        names[int(column)]: Tested(float(reached[:, number].mean()), float(corrected[number]))
        for number, column in enumerate(there)
    }


def _counts(tallies: Mapping[str, Tally]) -> tuple[Numbers, list[str]]:
    """Counts of several arms, (U, arms, counts), and the names of the counts; zero where an arm lacks one."""
    units = dict.fromkeys(unit for tally in tallies.values() for unit in tally.units)
    place = {unit: number for number, unit in enumerate(units)}
    names = list(dict.fromkeys(name for tally in tallies.values() for name in tally.counts))
    counts = np.zeros((len(units), len(tallies), len(names)))
    for arm, tally in enumerate(tallies.values()):
        rows = [place[unit] for unit in tally.units]
        for name, values in tally.counts.items():
            counts[rows, arm, names.index(name)] = values
    return counts, names


def _swaps(units: int, draws: int, seed: int) -> Iterator[Numbers]:
    """Which units are swapped, (r, U) of 0 and 1 for r swaps at a time; all of them where they are not too many."""
    every = 2**units <= draws
    count = 2**units if every else draws
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // max(1, units))
    for start in range(0, count, rows):
        numbers = np.arange(start, min(start + rows, count))
        if every:
            swapped = (numbers[:, None] >> np.arange(units)) & 1
        else:
            swapped = generator.integers(2, size=(len(numbers), units), dtype=np.int8)
            swapped[numbers == 0] = 0
        yield swapped.astype(np.float64)


def _sizes(differences: Numbers) -> Numbers:
    """Sizes of differences in units of their spread over the swaps, (R, F); infinite where there is no value."""
    known = np.isfinite(differences)
    squares = np.where(known, differences, 0.0) ** 2
    spread = np.sqrt(squares.sum(axis=0) / known.sum(axis=0))
    spread = np.where(spread > NOTHING, spread, np.inf)  # what no swap changes differs by rounding alone
    return np.where(known, np.abs(differences) / spread, np.inf)


def _stepped_down(sizes: Numbers) -> Numbers:
    """P values of all figures together, (F,), of sizes whose first row was measured, (R, F)."""
    order = np.argsort(sizes[0], kind="stable")
    largest = np.maximum.accumulate(sizes[:, order], axis=1)  # of a figure and of those with smaller differences
    shares = (largest >= largest[0] * (1 - ROUNDING)).mean(axis=0)
    found = np.empty(len(order))
    found[order] = np.maximum.accumulate(shares[::-1])[::-1]
    return found
