"""Lowers the scores of tokens that stand in the prompt or in the answer so far: the penalty on repetition.

Shape letters (``docs/notation.md``): B samples, T prompt tokens, V vocabulary; here also L lines, one per sample or one
per beam of a sample.

*Source*: "CTRL: A Conditional Transformer Language Model for Controllable Generation", arXiv 1909.05858, sec. 4.1; as
transformers computes it, but that padding counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmfix.decoding.choice import Choice


class Repetition:
    """Remembers which tokens stand in each line, and lowers their scores.

    Args:
        penalty: Above 0; positive scores are divided by it, negative ones multiplied. 1 changes nothing.
        ids: (B, T) int64 prompts.
        mask: (B, T), 0 where a prompt is filled up.
    """

    def __init__(self, penalty: float, ids: Tensor, mask: Tensor) -> None:
        self._penalty, self._ids, self._mask = penalty, ids, mask.bool()
        self._stands: Tensor | None = None  # (L, V) bool
        self._prompts: Tensor | None = None  # (B, V) bool

    def lowered(self, scores: Tensor) -> Tensor:
        """Returns (L, V) scores, lowered where a token stands in its line."""
        return penalized(scores, self._known(scores.shape[-1]), self._penalty)

    def lowered_behind(self, scores: Tensor, samples: Sequence[int], answers: Sequence[tuple[int, ...]]) -> Tensor:
        """Returns (L, V) scores, lowered where a token stands in its sample's prompt or in the line's answer.

        Args:
            scores: (L, V).
            samples: The sample of each line.
            answers: What is said in each line; nothing is remembered of it.
        """
        if self._prompts is None:
            self._prompts = standing(self._ids, self._mask, scores.shape[-1])
        stands = self._prompts[list(samples)]  # (L, V)
        if longest := max(map(len, answers)):
            filled = [answer + answer[-1:] * (longest - len(answer)) for answer in answers]
            stands = stands.scatter(1, torch.tensor(filled, device=scores.device), True)
        return penalized(scores, stands, self._penalty)

    def add(self, tokens: Tensor) -> None:
        """Takes the next token of each line, (L,) int64; scores must have been lowered before."""
        if self._stands is not None:
            self._stands = self._stands.scatter(1, tokens[:, None], True)

    def keep(self, lines: Tensor) -> None:
        """Keeps some of the lines, or repeats some, (L',) int64 numbers of the present ones."""
        if self._stands is not None:
            self._stands = self._stands[lines]

    def _known(self, vocabulary: int) -> Tensor:
        if self._stands is None:
            self._stands = standing(self._ids, self._mask, vocabulary)
        return self._stands


class Unrepeated:
    """Chooses tokens from lowered scores by another choice; see ``choice.Choice``.

    Args:
        choice: Chooses from the scores.
        repetition: Lowers them.
    """

    def __init__(self, choice: Choice, repetition: Repetition) -> None:
        self._choice, self._repetition = choice, repetition

    def __call__(self, scores: Tensor) -> Tensor:
        """Chooses (B,) int64 tokens from (B, V) float32 scores."""
        tokens = self._choice(self._repetition.lowered(scores))
        self._repetition.add(tokens)
        return tokens

    def keep(self, samples: Tensor) -> None:
        """Keeps some of the samples, (S,) int64 numbers of the present ones."""
        self._choice.keep(samples)
        self._repetition.keep(samples)


class RepetitionPenalty(LogitsProcessor):
    """Lowers scores likewise in the model's own ``generate``, whose rows may be beams, side by side for each sample.

    Args:
        penalty: As of ``Repetition``.
        ids: (B, T) int64 prompts.
        mask: (B, T), 0 where a prompt is filled up.
    """

    def __init__(self, penalty: float, ids: Tensor, mask: Tensor) -> None:
        self._penalty, self._ids, self._mask = penalty, ids, mask.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns (L, V) scores, lowered where a token stands in (L, T + generated) prompts and answers."""
        prompts = standing(self._ids, self._mask, scores.shape[-1])  # (B, V)
        stands = prompts.repeat_interleave(len(scores) // len(prompts), dim=0)
        return penalized(scores, stands.scatter(1, input_ids[:, self._ids.shape[1] :], True), self._penalty)


def standing(ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """Returns which tokens stand in each of (B, T) prompts where the mask is set, (B, V) bool."""
    real = mask & (ids < vocabulary)  # the token of a picture may be beyond what a model can say
    found = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
    return found.scatter(1, torch.where(real, ids, vocabulary), True)[:, :vocabulary]


def penalized(scores: Tensor, stands: Tensor, penalty: float) -> Tensor:
    """Divides positive (L, V) scores by the penalty and multiplies negative ones, where (L, V) ``stands`` is set."""
    return torch.where(stands, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
