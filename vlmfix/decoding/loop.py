"""Runs the decoding loop: prefill, then choose a token and run it, until every sample has ended.

A sample that has ended leaves the batch with its branches, so that a long answer does not carry it along. A GPU does
not wait for the host between two recorded steps: the next one is started before the host reads which tokens were
chosen, and its scores for samples that have ended are dropped. Shape letters (``docs/notation.md``): B samples that go
on, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfix.decoding.choice import Choice
from vlmfix.decoding.running import Running


@dataclass(frozen=True)
class Said:
    """Holds the tokens that one step chose.

    Attributes:
        samples: Numbers, in the batch, of the samples that had not ended before the step.
        tokens: The new token of each.
        broken: Whether the scores of each held NaN or +inf.
        logprobs: Natural log-probability of each token under the scores, as the decoder made them.
        entropies: Entropy of the distribution that each was chosen from, in nats.
        alone: Whether rules that act only where the clean row is unsure have left it alone; empty without such a rule.
    """

    samples: Sequence[int]
    tokens: Sequence[int]
    broken: Sequence[bool]
    logprobs: Sequence[float]
    entropies: Sequence[float]
    alone: Sequence[bool] = ()


def decode(call: Running, choice: Choice, ends: Collection[int], unwanted: Collection[int] = ()) -> Iterator[Said]:
    """Decodes a call step by step.

    Args:
        call: The samples at work.
        choice: How tokens are chosen.
        ends: Tokens that end an answer.
        unwanted: Samples that nobody waits for any more; they leave at the next step. The caller may add to them.

    Yields:
        The tokens of each step; a sample's last token is one of ``ends``, the last that it has room for, or the
        last before it became unwanted.
    """
    going = list(range(len(call.room)))
    scores = call.prompt()  # (B, V)
    for step in itertools.count(1):
        tokens = choice(scores)
        told = _Told(tokens, scores, call.alone)
        ahead = call.replays and step < min(call.room[sample] for sample in going)
        scores = call.token(tokens) if ahead else scores
        said = told.read(going)
        yield said
        stay = [
            place
            for place, (sample, token) in enumerate(zip(going, said.tokens, strict=True))
            if token not in ends and step < call.room[sample] and sample not in unwanted
        ]
        if not stay:
            return
        if len(stay) < len(going):
            lines = torch.tensor(stay, device=tokens.device)
            call.keep(lines)
            choice.keep(lines)
            going, tokens, scores = [going[place] for place in stay], tokens[lines], scores[lines]
        if not ahead:
            scores = call.token(tokens)


class _Told:
    """Brings what one step chose to the host, without waiting for what the device is told to do afterwards.

    Args:
        tokens: (B,) int64.
        scores: (B, V), of which rows may be broken.
        alone: (B,) bool, or None; see ``Said.alone``.
    """

    def __init__(self, tokens: Tensor, scores: Tensor, alone: Tensor | None) -> None:
        logs = scores.log_softmax(dim=-1)
        own = logs.gather(1, tokens[:, None])[:, 0]
        numbers = torch.stack([own, entropies(logs)])  # (2, B)
        whole = torch.stack([tokens, broken(scores).long(), *([] if alone is None else [alone.long()])])  # (2 or 3, B)
        self._numbers, self._whole = (part.to("cpu", non_blocking=part.is_cuda) for part in (numbers, whole))
        self._there = torch.cuda.Event() if whole.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self, samples: Sequence[int]) -> Said:
        """Waits for what the step chose for these B samples."""
        if self._there is not None:
            self._there.synchronize()
        tokens, *marks = self._whole.tolist()
        odd, *alone = [[bool(one) for one in row] for row in marks]
        return Said(tuple(samples), tokens, odd, *self._numbers.tolist(), *alone)


def entropies(logs: Tensor) -> Tensor:
    """Returns the entropy in nats of each row of (B, V) log-probabilities, (B,); tokens at -inf count for nothing."""
    return -torch.where(logs > -math.inf, logs.exp() * logs, 0.0).sum(dim=-1)


def broken(scores: Tensor) -> Tensor:
    """Returns, for each row of (B, V) scores, whether it holds NaN or +inf, (B,) bool."""
    return ~(scores < math.inf).all(dim=-1)
