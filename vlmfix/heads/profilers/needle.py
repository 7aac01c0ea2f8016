"""A needle of random words beside the question, which the model is made to say: what retrieval and echo measure with.

Shape letters (``docs/notation.md``): B rows, H query heads, K keys; here also N words' tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import LastRows
from vlmfix.attention.session import edited
from vlmfix.errors import LayoutError
from vlmfix.heads.profiler import Profiler
from vlmfix.insight.wording import Tail
from vlmfix.insight.work import Work
from vlmfix.models.layout import Batch

WORDS = tuple(
    "amber anchor basket beacon bridge candle canyon carpet castle cedar copper cotton desert drawer engine feather "
    "garden glacier hammer harbor island jacket kettle ladder lantern marble meadow mirror needle orchard paddle "
    "pepper pillow planet ribbon saddle silver tunnel velvet window".split()
)
"""What the needle is drawn from."""
ASKED = "The secret words are: {needle}. {question} Then repeat the secret words."


@dataclass(frozen=True, kw_only=True)
class NeedleProfiler(Profiler):
    """A profiler that measures with a needle.

    Args:
        words: Length of the needle in words, from 1 to 40.
    """

    words: int = 8

    def __post_init__(self) -> None:
        self._require(1 <= self.words <= len(WORDS), "words", f"from 1 to {len(WORDS)}")


@dataclass(frozen=True, eq=False)
class Said:
    """Prompts that hold needles, each with its needle as the answer.

    Attributes:
        work: The prompts.
        places: For each row, the columns of its needle's tokens, ascending.
        answer: (B, N) the needles' tokens; shorter ones are filled up.
    """

    work: Work
    places: list[list[int]]
    answer: Tensor

    @classmethod
    def of(cls, work: Work, words: int) -> Said:
        """Draws a needle for each row of a batch, and asks its questions with them.

        Raises:
            LayoutError: A prompt does not hold its needle.
        """
        needles = [" ".join(work.random(row).sample(WORDS, words)) for row in range(work.batch.rows)]
        questions = [
            ASKED.format(needle=needle, question=asked or "")
            for needle, asked in zip(needles, work.batch.prompts or (), strict=True)
        ]
        batch = work.vlm.encode(questions, work.batch.pictures or (), system=work.batch.system)
        asked = Work(work.vlm, batch, work.vlm.layout(batch), work.first, work.seed)
        places = [_place(Tail.of(asked, row), needle) for row, needle in enumerate(needles)]
        ids = batch["input_ids"]
        answer = ids.new_zeros(batch.rows, max(len(place) for place in places))
        for row, place in enumerate(places):
            answer[row, : len(place)] = ids[row, place]
        return cls(asked, places, answer)

    @torch.no_grad()
    def watched(self, reader: Callable[[Site, Tensor], None]) -> None:
        """Runs prompts and answers once.

        Args:
            reader: Called in every layer with the weights of all rows, (B, H, R, K), of which the last N are the
                answer's; the row before these predicts its first token.
        """
        work, batch = self.work, self.work.batch
        model: Any = work.vlm.model
        with edited(work.vlm, work.layout, [LastRows(reader=reader)]):
            model(**_answered(batch, self.answer), use_cache=False, logits_to_keep=1)


def _place(tail: Tail, needle: str) -> list[int]:
    """Finds the columns of the needle's tokens."""
    start = tail.text.find(needle)
    if start < 0:
        raise LayoutError(f"the prompt does not hold {needle!r}", "the chat template must keep the user's words")
    return tail.over(start, start + len(needle))


def _answered(batch: Batch, answer: Tensor) -> Batch:
    """Puts the beginning of an answer, (B, N) tokens, behind prompts."""
    inputs = {
        name: torch.cat([batch[name], torch.zeros_like(answer, dtype=batch[name].dtype)], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids")
        if name in batch
    }
    mask = torch.cat([batch.attention_mask, torch.ones_like(answer)], dim=1)
    return batch.with_inputs(input_ids=torch.cat([batch["input_ids"], answer], dim=1), attention_mask=mask, **inputs)
