"""Greedy captions whose object words are known to be real or hallucinated, and the steps that began these words.

Shape letters (``docs/notation.md``): B rows, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.attention.windows import check_windows
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.running import running
from vlmfix.errors import DataError
from vlmfix.insight.last_step import LastStep
from vlmfix.insight.wording import decoded
from vlmfix.insight.work import Work
from vlmfix.models.context import room_for_answers
from vlmfix.upstream import defaults
from vlmfix.upstream.positions import prompt_positions


@dataclass(frozen=True)
class Word:
    """An object that a caption names.

    Attributes:
        start: Where it begins in the caption.
        end: Where it ends, exclusive.
        real: Whether the object is in the picture.
    """

    start: int
    end: int
    real: bool


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Who says which words of a caption name objects.

    Attributes:
        words: From the number of the picture in the profile, from 0, and its caption to the caption's object words.
        about: Where the truth comes from, in JSON values, for the profile's card.
    """

    words: Callable[[int, str], Sequence[Word]]
    about: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Told:
    """Captions, with what is needed to take each of their steps again.

    Attributes:
        tokens: For each of B rows its tokens, the end token included.
        positions: (B, T) or (3 or 4, B, T) position ids of the prompts.
        cache: Keys and values of the prompts and of the captions.
    """

    tokens: tuple[tuple[int, ...], ...]
    positions: Tensor
    cache: DynamicCache

    def step(self, work: Work, row: int, place: int) -> LastStep:
        """The step that chose a row's token.

        Args:
            work: The batch.
            row: The row.
            place: Number of the token in the caption, from 0.
        """
        own = self.tokens[row]
        return LastStep.behind(work, row, positions=self.positions, cache=self.cache, said=own, place=place)


@torch.no_grad()
def tell(work: Work, longest: int) -> Told:
    """Lets the model answer greedily.

    Args:
        work: The batch.
        longest: Longest answer in tokens, at least 1.

    Raises:
        DataError: Prompt and answer may be longer than the model's context, or than a sliding window.
    """
    room_for_answers(work.vlm, work.batch.lengths, wanted=longest)
    check_windows(work.vlm, range(work.layers), work.batch.length, longest)
    ends, plan = defaults.ends(work.vlm.model), DecodingPlan(compiles=False)
    answers: list[list[int]] = [[] for _ in range(work.batch.rows)]
    with running(work.vlm, work.batch, work.layout, plan, limit=longest, name="a caption") as call:
        scores, going = call.prompt(), True
        while going:
            tokens = scores.argmax(dim=-1)
            for answer, token in zip(answers, tokens.tolist(), strict=True):
                if not (answer and answer[-1] in ends):
                    answer.append(token)
            going = any(len(answer) < longest and answer[-1] not in ends for answer in answers)
            if going:
                scores = call.token(tokens)  # of every row: a row that has ended keeps its place in the cache
        cache = call.cache
    positions = prompt_positions(work.vlm.model, work.batch)
    return Told(tokens=tuple(map(tuple, answers)), positions=positions, cache=cache)


def beginnings(work: Work, row: int, tokens: Sequence[int], labels: Labels) -> dict[int, bool]:
    """The tokens that begin an object word, and whether they are real.

    A token that begins a hallucinated word and a real one counts as hallucinated.

    Args:
        work: The batch.
        row: The row.
        tokens: Its caption.
        labels: Who says which words name objects.

    Returns:
        Number of the token in the caption, ascending -> whether its word is real.

    Raises:
        DataError: A word begins outside the caption.
    """
    text, ends = decoded(work.vlm.processor.tokenizer, tokens, special=False)
    found: dict[int, bool] = {}
    for word in labels.words(work.first + row, text):
        if not 0 <= word.start < len(text):
            raise DataError(
                f"an object word begins at {word.start} in a caption of {len(text)} characters",
                "labels give places in the caption that they are handed",
            )
        place = next(number for number, end in enumerate(ends) if end > word.start)
        found[place] = word.real and found.get(place, True)
    return dict(sorted(found.items()))
