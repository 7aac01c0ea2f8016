"""Runs the decoding loop: prefill, then choose a token and run it, until every sample has ended.

A sample that has ended leaves the batch with its branches, so that a long answer does not carry it along. Shape letters
(``docs/notation.md``): B samples that go on, V vocabulary.
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
    """

    samples: Sequence[int]
    tokens: Sequence[int]
    broken: Sequence[bool]


def decode(call: Running, choice: Choice, ends: Collection[int]) -> Iterator[Said]:
    """Decodes a call step by step.

    Args:
        call: The samples at work.
        choice: How tokens are chosen.
        ends: Tokens that end an answer.

    Yields:
        The tokens of each step; a sample's last token is one of ``ends``, or the last that it has room for.
    """
    going = list(range(len(call.room)))
    scores = call.prompt()  # (B, V)
    for step in itertools.count(1):
        tokens = choice(scores)
        said = tokens.tolist()
        yield Said(tuple(going), said, broken(scores))
        stay = [n for n, token in enumerate(said) if token not in ends and step < call.room[going[n]]]
        if not stay:
            return
        if len(stay) < len(going):
            lines = torch.tensor(stay, device=tokens.device)
            call.keep(lines)
            choice.keep(lines)
            going, tokens = [going[place] for place in stay], tokens[lines]
        scores = call.token(tokens)


def broken(scores: Tensor) -> list[bool]:
    """Returns, for each row of (B, V) scores, whether it holds NaN or +inf."""
    return (~(scores < math.inf).all(dim=-1)).tolist()
