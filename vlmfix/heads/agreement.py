"""How far two profiles agree: the same strongest heads, and the same ranking of all."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfix.errors import ProfileMismatchError
from vlmfix.heads.moments import rank_correlation
from vlmfix.heads.profile import HeadProfile


@dataclass(frozen=True)
class Agreement:
    """How far two profiles agree.

    Attributes:
        count: How many of the strongest heads were held against each other.
        overlap: Share of them that both have, in [0, 1].
        chance: Overlap that two random rankings would have on average.
        correlation: Spearman's rank correlation over all heads, in [-1, 1]; None when a profile gives all the same.
    """

    count: int
    overlap: float
    chance: float
    correlation: float | None


def agreement(left: HeadProfile, right: HeadProfile, *, count: int = 20) -> Agreement:
    """Holds two profiles of models of one shape against each other; they may come from different profilers.

    Args:
        left: A profile.
        right: Another.
        count: How many of the strongest heads to compare, from 1; at most half of all heads are.

    Raises:
        ProfileMismatchError: The numbers of layers or heads differ.
    """
    if left.scores.shape != right.scores.shape:
        shapes = (f"{layers} layers of {heads} heads" for layers, heads in (left.scores.shape, right.scores.shape))
        raise ProfileMismatchError(
            f"the profiles are of {' and '.join(shapes)}", "compare profiles of the same model, or of two of its size"
        )
    every = left.scores.numel()
    count = max(1, min(count, every // 2))
    both = set(left.top(count)) & set(right.top(count))
    correlation = rank_correlation(left.scores, right.scores)
    return Agreement(count=count, overlap=len(both) / count, chance=count / every, correlation=correlation)
