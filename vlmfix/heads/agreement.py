"""How far two profiles agree: the same strongest heads, and the same ranking of all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scipy import stats

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
        p: Probability that two random rankings have as much overlap, or more, in (0, 1].
        shared: (layer, head) of the heads that both have, as strong in the first as they stand.
        correlation: Spearman's rank correlation over all heads, in [-1, 1]; None when a profile gives all the same.
    """

    count: int
    overlap: float
    chance: float
    p: float
    shared: tuple[tuple[int, int], ...]
    correlation: float | None


def agreement(left: HeadProfile, right: HeadProfile, *, count: int = 20, either_sign: bool = False) -> Agreement:
    """Holds two profiles of models of one shape against each other; they may come from different profilers.

    Args:
        left: A profile.
        right: Another.
        count: How many of the strongest heads to compare, from 1; at most half of all heads are.
        either_sign: Takes the heads with the largest scores whatever their sign: of ``patching`` those that carry the
            task, for the one answer or for the other.

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
    if either_sign:
        left, right = (replace(part, scores=part.scores.abs()) for part in (left, right))
    other = set(right.top(count))
    shared = tuple(head for head in left.top(count) if head in other)
    return Agreement(
        count=count,
        overlap=len(shared) / count,
        chance=count / every,
        p=float(stats.hypergeom.sf(len(shared) - 1, every, count, count)),
        shared=shared,
        correlation=rank_correlation(left.scores, right.scores),
    )
