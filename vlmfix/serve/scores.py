"""Reads off the log-probabilities of chosen tokens, and of the most probable ones beside them.

They are those of the scores after the decoder and before temperature and nucleus. Shape letters
(``docs/notation.md``): B samples that go on, V vocabulary; here also K tokens beside the chosen one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfix.decoding.choice import Choice

LEAST = -9999.0
"""What the protocol has for a token that cannot be said."""


@dataclass(frozen=True)
class Entry:
    """Holds a token with its log-probability, and the K most probable tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Read:
    """Chooses as another choice does, and keeps the log-probabilities of the newest step.

    Args:
        choice: The choice.
        samples: B.
        most: K.
    """

    def __init__(self, choice: Choice, samples: int, most: int) -> None:
        self._choice, self._most = choice, most
        self._going = list(range(samples))
        self._newest: tuple[list[int], Tensor, Tensor, Tensor] | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Chooses (B,) int64 tokens from (B, V) float32 scores."""
        tokens = self._choice(scores)
        logs = scores.log_softmax(dim=-1)
        own = logs.gather(1, tokens[:, None])
        best = logs.topk(min(self._most, logs.shape[1]), dim=-1)
        self._newest = (self._going, torch.cat([own, best.values], dim=1), best.indices, tokens)
        return tokens

    def keep(self, samples: Tensor) -> None:
        """Keeps some of the samples, (S,) int64 numbers of the present ones."""
        self._choice.keep(samples)
        self._going = [self._going[place] for place in samples.tolist()]

    def newest(self) -> dict[int, Entry]:
        """Returns the entry of each sample of the newest step."""
        if self._newest is None:
            return {}
        going, logs, ids, tokens = self._newest
        rows = zip(going, tokens.tolist(), logs.clamp(min=LEAST).tolist(), ids.tolist(), strict=True)
        return {
            sample: Entry(token, own, tuple(zip(others, rest, strict=True)))
            for sample, token, (own, *rest), others in rows
        }
