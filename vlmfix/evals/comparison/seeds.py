"""One evaluation with several seeds: mean and standard deviation of every figure, arm by arm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmfix.errors import UsageError
from vlmfix.evals.comparison.comparable import refuse_incomparable
from vlmfix.evals.comparison.compare import DRAWS_PER_ARM, MIN_DRAWS, Arm, Change, Comparison, compare
from vlmfix.evals.record import EvalRun


@dataclass(frozen=True)
class Spread:
    """What a figure is over several seeds.

    Attributes:
        mean: Mean; None where a seed has no value.
        deviation: Standard deviation of a sample (n - 1); None likewise.
        values: By seed.
    """

    mean: float | None
    deviation: float | None
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class SeededFigure:
    """One figure of an arm over several seeds.

    Attributes:
        first: The figure with the first seed: what it is called, and which side is better.
        value: The arm's.
        difference: Arm minus plain arm, seed by seed.
    """

    first: Change
    value: Spread
    difference: Spread


@dataclass(frozen=True)
class Seeded:
    """An evaluation with several seeds.

    Attributes:
        first: The comparison of the first seed.
        seeds: The seeds, in order.
        arms: For each arm, the plain one first, its figures.
    """

    first: Comparison
    seeds: tuple[int, ...]
    arms: dict[str, tuple[SeededFigure, ...]]


def over_seeds(runs: Sequence[EvalRun]) -> Seeded:
    """Sums up runs that differ in their seed alone.

    Args:
        runs: Two or more, with the same arms.

    Raises:
        UsageError: They differ in something else, have the same seed, or other arms.
        DataError: No arm has a sample in common with its plain arm.
    """
    seeds = tuple(int(run.card["decoding"]["seed"]) for run in runs)
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"the runs have the seeds {', '.join(map(str, seeds))}", "give runs that differ in --seed, each once"
        )
    refuse_incomparable([replace(run, card=_without_seed(run.card)) for run in runs])
    if other := next((run for run in runs if list(run.answers) != list(runs[0].answers)), None):
        raise UsageError(
            f"{runs[0].folder} has the arms {', '.join(runs[0].answers)}, {other.folder} {', '.join(other.answers)}",
            "run the same arms, in the same order, with every seed",
        )
    found = [compare([run], draws=_draws(run)) for run in runs]
    arms = {
        arm.name: tuple(_figures([_arm(one, arm.name) for one in found])) for arm in (*found[0].plain, *found[0].arms)
    }
    return Seeded(found[0], seeds, arms)


def _without_seed(card: dict[str, Any]) -> dict[str, Any]:
    return card | {"decoding": card["decoding"] | {"seed": None}}


def _draws(run: EvalRun) -> int:
    return max(MIN_DRAWS, DRAWS_PER_ARM * len(run.answers))


def _arm(comparison: Comparison, name: str) -> Arm:
    return next(arm for arm in (*comparison.plain, *comparison.arms) if arm.name == name)


def _figures(arms: Sequence[Arm]) -> list[SeededFigure]:
    found = []
    for change in arms[0].changes:
        same = [next((one for one in arm.changes if one.figure == change.figure), None) for arm in arms]
        values = tuple(None if one is None else one.arm.value for one in same)
        differences = tuple(None if one is None else one.difference.value for one in same)
        found.append(SeededFigure(change, _spread(values), _spread(differences)))
    return found


def _spread(values: tuple[float | None, ...]) -> Spread:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Spread(None, None, values)
    return Spread(statistics.fmean(known), statistics.stdev(known), values)
