"""The arithmetic of the pictures: weights and probabilities, as short rows of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Row = list[float]
Share = float | None


def normal(weights: Sequence[float]) -> Row:
    """Divides weights by their sum."""
    return [weight / sum(weights) for weight in weights]


def moved(weights: Sequence[float], given: Sequence[int], kept: float, taking: Sequence[int]) -> Row:
    """Moves a part of some weights to others, in proportion to what these have."""
    freed = (1 - kept) * sum(weights[j] for j in given)
    total = sum(weights[j] for j in taking)
    new = list(weights)
    for j in given:
        new[j] *= kept
    for j in taking:
        new[j] += freed * weights[j] / total
    return new


def raised(weights: Sequence[float], gains: Mapping[int, float]) -> Row:
    """Adds to the scores of some weights a share of their size, before the softmax."""
    scores = [math.log(weight) + 4 for weight in weights]
    return normal([math.exp(score + gains.get(j, 0.0) * abs(score)) for j, score in enumerate(scores)])


def softmax(scores: Sequence[float]) -> Row:
    """Makes probabilities of scores."""
    return normal([math.exp(score) for score in scores])


def cut(scores: Sequence[float], clean: Sequence[float], share: float) -> list[Share]:
    """Makes probabilities of scores, without the tokens that are improbable in the clean row."""
    kept = [p >= share * max(clean) for p in clean]
    left = iter(softmax([score for score, keep in zip(scores, kept, strict=True) if keep]))
    return [next(left) if keep else None for keep in kept]


def logs(shares: Sequence[float]) -> Row:
    """Returns logarithms."""
    return [math.log(share) for share in shares]


def mixed(*weighted: tuple[float, Sequence[float]]) -> Row:
    """Adds log-probabilities, each with its weight."""
    return [
        sum(weight * value for (weight, _), value in zip(weighted, column, strict=True))
        for column in zip(*(logs(shares) for _, shares in weighted), strict=True)
    ]
