"""How a token is chosen from the scores of one step: the most probable one, or a draw of each row's own.

Shape letters (``docs/notation.md``): B samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vlmfix.decoding.draws import drawing


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
    """Draws by the Gumbel-max rule with a generator per sample; see ``RowSampler``.

    Args:
        seeds: One seed per sample.
        device: Where the scores are.
        temperature: Above 0; scores are divided by it.
        top_p: Nucleus of the draw, in (0, 1].
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, *, temperature: float, top_p: float) -> None:
        self._shaping, self._sampler = drawing(seeds, device, temperature=temperature, top_p=top_p)

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens from (B, V) float32 scores."""
        said = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)  # neither reads it
        for processor in (*self._shaping, self._sampler):
            scores = processor(said, scores)
        return scores.argmax(dim=-1)

    def keep(self, samples: Tensor) -> None:
        """Goes on with the generators of some of the samples, (S,) int64 numbers of the present ones."""
        self._sampler.keep(samples)
