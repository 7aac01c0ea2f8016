"""Mean and standard error of any number of pictures in bounded memory, and when a ranking is stable.

Shape letters (``docs/notation.md``): B pictures of a batch, L layers, H query heads; here also N pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from scipy import stats
from torch import Tensor

LOOK_EVERY = 32
"""Pictures between two looks at how stable a ranking is."""
STABLE = 0.99
"""Reliability from which a ranking counts as stable."""


class Tally(Protocol):
    """What is known of the pictures so far: how many say something, their mean and its standard error."""

    @property
    def count(self) -> int:
        """Number of pictures."""

    @property
    def mean(self) -> Tensor:
        """(L, H) float64; NaN while it is not known."""

    @property
    def stderr(self) -> Tensor:
        """(L, H) float64 standard error of the mean; NaN with fewer than two pictures."""

    def added(self, values: Tensor) -> Self:
        """With N further pictures, (N, L, H, ...) float64."""

    def merged(self, other: Self) -> Self:
        """Of both together."""


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
class Contrast:
    """Difference of two means over words, when every picture has some words of two kinds.

    Every word counts alike, so pictures with many words count more. Words of one picture are not independent: the
    standard error is that of the linearised difference with pictures as units.

    Attributes:
        count: Number of pictures.
        sums: (L, H, 4) float64, sums over pictures of a picture's four numbers: the sum over its words of the first
            kind, their number, and the same of the second kind.
        products: (L, H, 4, 4) float64, sums over pictures of the products of these numbers.
    """

    count: int
    sums: Tensor
    products: Tensor

    @classmethod
    def empty(cls, layers: int, heads: int) -> Contrast:
        """Of no pictures."""
        zeros = torch.zeros(layers, heads, 4, 4, dtype=torch.float64)
        return cls(0, zeros[..., 0], zeros)

    def added(self, values: Tensor) -> Contrast:
        """With (N, L, H, 4) further pictures."""
        if not len(values):
            return self
        products = torch.einsum("nlhi,nlhj->lhij", values, values)
        return Contrast(self.count + len(values), self.sums + values.sum(dim=0), self.products + products)

    def merged(self, other: Contrast) -> Contrast:
        """Of both together."""
        return Contrast(self.count + other.count, self.sums + other.sums, self.products + other.products)

    @property
    def first(self) -> Tensor:
        """(L, H) mean over words of the first kind; NaN without any."""
        return self.sums[..., 0] / self.sums[..., 1]

    @property
    def second(self) -> Tensor:
        """(L, H) mean over words of the second kind; NaN without any."""
        return self.sums[..., 2] / self.sums[..., 3]

    @property
    def mean(self) -> Tensor:
        """(L, H) difference of the two means; NaN while there are no words of a kind."""
        return self.first - self.second

    @property
    def stderr(self) -> Tensor:
        """(L, H) standard error of the difference; NaN with fewer than two pictures."""
        if self.count < 2:
            return torch.full_like(self.mean, math.nan)
        shares = torch.stack([self.sums[..., 1], self.sums[..., 1], -self.sums[..., 3], -self.sums[..., 3]], dim=-1)
        ones = torch.ones_like(self.first)
        slopes = torch.stack([ones, -self.first, ones, -self.second], dim=-1) / shares  # (L, H, 4)
        squares = torch.einsum("lhi,lhij,lhj->lh", slopes, self.products, slopes)
        return (squares.clamp(min=0) * self.count / (self.count - 1)).sqrt()


T = TypeVar("T", bound=Tally)


@dataclass(frozen=True, eq=False)
class Halves(Generic[T]):
    """Two running means, of every other picture each, so that the ranking of one can be held against the other.

    Attributes:
        even: Of the first, third, ... picture with a value.
        odd: Of the second, fourth, ...
    """

    even: T
    odd: T

    def added(self, values: Tensor) -> Halves[T]:
        """With (B, L, H, ...) further values; a picture of which any value is not finite is left out."""
        values = values.detach().double().cpu()
        values = values[values.flatten(1).isfinite().all(dim=1)]
        start = self.whole.count % 2
        return replace(self, even=self.even.added(values[start::2]), odd=self.odd.added(values[1 - start :: 2]))

    @property
    def whole(self) -> T:
        """Of all pictures."""
        return self.even.merged(self.odd)

    @property
    def reliability(self) -> float | None:
        """How well the ranking of all heads would agree with that of as many other pictures.

        Spearman's rank correlation r of the two halves, corrected for their being halves: 2r / (1 + r) (Spearman and
        Brown 1910). None with fewer than two pictures, or when the heads of a half do not differ or are not known.
        """
        if self.odd.count == 0:
            return None
        r = rank_correlation(self.even.mean, self.odd.mean)
        return None if r is None else 2 * r / (1 + r) if r > 0 else r


def rank_correlation(left: Tensor, right: Tensor) -> float | None:
    """Spearman's correlation of two scores of the same heads; None when either gives all the same, or has a NaN."""
    first, second = left.flatten().double(), right.flatten().double()
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return None
    if bool(first.isnan().any()) or bool(second.isnan().any()):
        return None
    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)
