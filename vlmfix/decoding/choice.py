"""How a token is chosen from the scores of one step: the most probable one, or a draw of each row's own.

Shape letters (``docs/notation.md``): B samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import TopPLogitsWarper


class Choice(Protocol):
    """Chooses a token for each sample; it may hold the state of one call."""

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens from (B, V) float32 scores."""

    def keep(self, samples: Tensor) -> None:
        """Goes on with some of the samples, (S,) int64 numbers of the present ones."""


class MostProbable:
    """Takes the token with the highest score, the first of equal ones."""

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens from (B, V) float32 scores."""
        return scores.argmax(dim=-1)

    def keep(self, samples: Tensor) -> None:
        """Nothing to do: it remembers nothing."""


class Drawn:
    """Draws by the Gumbel-max rule with a generator per sample, so that a draw does not depend on its neighbours.

    The most probable token of ``log p + Gumbel noise`` is distributed as ``p``.

    Args:
        seeds: One seed per sample.
        device: Where the scores are.
        temperature: Above 0; scores are divided by it.
        top_p: Nucleus of the draw, in (0, 1].
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, *, temperature: float, top_p: float) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens from (B, V) float32 scores."""
        if self._temperature != 1:
            scores = scores / self._temperature
        if self._nucleus is not None:
            scores = self._nucleus(torch.empty(0, dtype=torch.long), scores)
        draws = torch.stack([torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self._generators])
        tiny = torch.finfo(torch.float32).tiny
        return (scores - (-(draws.clamp(min=tiny).log())).clamp(min=tiny).log()).argmax(dim=-1)

    def keep(self, samples: Tensor) -> None:
        """Goes on with the generators of some of the samples, (S,) int64 numbers of the present ones."""
        self._generators = [self._generators[number] for number in samples.tolist()]
