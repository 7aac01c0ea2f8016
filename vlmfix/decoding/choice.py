"""How a token is chosen from the scores of one step: the most probable one, or a draw of each row's own.

Shape letters (``docs/notation.md``): B samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmfix.decoding.draws import RowSampler


class Choice(Protocol):
    """Chooses a token for each sample; it may hold the state of one call."""

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens from (B, V) float32 scores."""

    def keep(self, samples: Tensor) -> None:
        """Goes on with some of the samples, (S,) int64 numbers of the present ones."""


class Gated(Choice, Protocol):
    """Chooses tokens in a way of its own, in our loop and in a user's call of ``generate``."""

    def chosen(self, said: Tensor, scores: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses for those samples that have not ended.

        Args:
            said: (B, T + generated) int64 prompts and answers so far.
            scores: (B, V) float32 scores.
            going: (B,) bool, samples that have not ended; elsewhere any token is right.

        Returns:
            (B, V) the scores after whatever processes them, and (B,) int64 tokens.
        """


class MostProbable:
    """Takes the token with the highest score, the first of equal ones."""

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens from (B, V) float32 scores."""
        return scores.argmax(dim=-1)

    def keep(self, samples: Tensor) -> None:
        """Nothing to do: it remembers nothing."""


class Known:
    """Takes tokens that are known beforehand, whatever the scores.

    Args:
        answers: The tokens of each sample, one after the other.
        device: Where the scores are.
    """

    def __init__(self, answers: Sequence[Sequence[int]], device: torch.device) -> None:
        self._rest, self._device = [iter(answer) for answer in answers], device

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens."""
        return torch.tensor([next(rest) for rest in self._rest], device=self._device)

    def keep(self, samples: Tensor) -> None:
        """Goes on with some of the samples, (S,) int64 numbers of the present ones."""
        self._rest = [self._rest[number] for number in samples.tolist()]


class Drawn:
    """Draws by the Gumbel-max rule with a generator per sample; see ``drawing``.

    Args:
        processors: What shapes the scores, and draws.
    """

    def __init__(self, processors: Sequence[LogitsProcessor]) -> None:
        self._processors = processors

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens from (B, V) float32 scores."""
        said = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)  # neither reads it
        for processor in self._processors:
            scores = processor(said, scores)
        return scores.argmax(dim=-1)

    def keep(self, samples: Tensor) -> None:
        """Goes on with the generators of some of the samples, (S,) int64 numbers of the present ones."""
        for processor in self._processors:
            if isinstance(processor, RowSampler):
                processor.keep(samples)
