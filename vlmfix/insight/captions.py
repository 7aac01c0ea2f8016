"""Greedy captions whose object words are known to be real or hallucinated, and the steps that began these words.

Shape letters (``docs/notation.md``): B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vlmfix.attention.windows import check_windows
from vlmfix.errors import DataError
from vlmfix.insight.last_step import LastStep
from vlmfix.insight.wording import decoded
from vlmfix.insight.work import Work
from vlmfix.models.context import room_for_answers
from vlmfix.upstream import defaults
from vlmfix.upstream.cache import handed_over
from vlmfix.upstream.text import TextInputs, watched


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
        inputs: For each step, what the text decoder was called with.
        cache: Keys and values of the prompts and of the captions.
    """

    tokens: tuple[tuple[int, ...], ...]
    inputs: tuple[TextInputs, ...]
    cache: DynamicCache

    def step(self, work: Work, row: int, place: int) -> LastStep:
        """The step that chose a row's token.

        Args:
            work: The batch.
            row: The row.
            place: Number of the token in the caption, from 0.
        """
        token = self.tokens[row][place]
        return LastStep.behind(work, row, inputs=self.inputs[place], cache=self.cache, token=token, generated=place)


@torch.no_grad()
def tell(work: Work, longest: int) -> Told:
    """Lets the model answer greedily.

    Args:
        work: The batch.
        longest: Longest answer in tokens, at least 1.

    Raises:
        DataError: Prompt and answer may be longer than the model's context, or than a sliding window.
    """
    model: Any = work.vlm.model
    room_for_answers(work.vlm, work.batch.lengths, wanted=longest)
    check_windows(work.vlm, range(work.layers), work.batch.length, longest)
    cache = DynamicCache()
    steps: list[TextInputs] = []

    def remember(inputs: TextInputs) -> None:
        steps.append(inputs.last())  # not the whole prompt

    with watched(work.vlm.family.decoder(model), remember), defaults.undisturbed(model):
        sequences = model.generate(
            **work.batch,
            **handed_over(model, cache),
            max_new_tokens=longest,
            disable_compile=True,
        )
    ends = defaults.ends(model)
    answers = sequences[:, work.batch.length :].tolist()
    lengths = [next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in answers]
    tokens = tuple(tuple(row[:length]) for row, length in zip(answers, lengths, strict=True))
    return Told(tokens=tokens, inputs=tuple(steps), cache=cache)


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
