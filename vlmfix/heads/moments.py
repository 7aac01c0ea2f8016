"""Mean and standard error of any number of pictures in bounded memory, and when a ranking is stable.

Shape letters (``docs/notation.md``): B pictures of a batch, L layers, H query heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

LOOK_EVERY = 32
"""Pictures between two looks at how stable a ranking is."""
STABLE = 0.99
"""Reliability from which a ranking counts as stable."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations (Welford 1962; merged as by Chan, Golub and LeVeque 1983).

    Attributes:
        count: Number of values.
        mean: (L, H) float64.
        squares: (L, H) float64, sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, layers: int, heads: int) -> Moments:
        """Of no values."""
        zeros = torch.zeros(layers, heads, dtype=torch.float64)
        return cls(0, zeros, zeros)

    def added(self, values: Tensor) -> Moments:
        """With (N, L, H) further values."""
        if not len(values):
            return self
        mean = values.mean(dim=0)  # (L, H)
        return self.merged(Moments(len(values), mean, (values - mean).square().sum(dim=0)))

    def merged(self, other: Moments) -> Moments:
        """Of both together."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        weight = other.count / count
        squares = self.squares + other.squares + step.square() * (self.count * weight)
        return Moments(count, self.mean + step * weight, squares)

    @property
    def stderr(self) -> Tensor:
        """(L, H) standard error of the mean, by the unbiased variance; NaN with fewer than two values."""
        if self.count < 2:
            return torch.full_like(self.mean, math.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt()


@dataclass(frozen=True, eq=False)
class Halves:
    """Two running means, of every other picture each, so that the ranking of one can be held against the other.

    Attributes:
        even: Of the first, third, ... picture with a value.
        odd: Of the second, fourth, ...
    """

    even: Moments
    odd: Moments

    @classmethod
    def empty(cls, layers: int, heads: int) -> Halves:
        """Of no pictures."""
        none = Moments.empty(layers, heads)
        return cls(none, none)

    def added(self, values: Tensor) -> Halves:
        """With (B, L, H) further values; a picture of which any value is not finite is left out."""
        values = values.detach().double().cpu()
        values = values[values.flatten(1).isfinite().all(dim=1)]
        start = self.whole.count % 2
        return replace(self, even=self.even.added(values[start::2]), odd=self.odd.added(values[1 - start :: 2]))

    @property
    def whole(self) -> Moments:
        """Of all pictures."""
        return self.even.merged(self.odd)

    @property
    def reliability(self) -> float | None:
        """How well the ranking of all heads would agree with that of as many other pictures.

        Spearman's rank correlation r of the two halves, corrected for their being halves: 2r / (1 + r) (Spearman and
        Brown 1910). None with fewer than two pictures or when the heads of a half do not differ.
        """
        if self.odd.count == 0:
            return None
        r = rank_correlation(self.even.mean, self.odd.mean)
        return None if r is None else 2 * r / (1 + r) if r > 0 else r


def rank_correlation(left: Tensor, right: Tensor) -> float | None:
    """Spearman's correlation of two scores of the same heads; None when either gives all heads the same."""
    first, second = left.flatten().double(), right.flatten().double()
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return None
    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)
