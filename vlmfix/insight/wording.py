"""Finds a question among a prompt's tokens, and its content words, by the prompt's decoded text.

Shape letters (``docs/notation.md``): B rows, T prompt tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmfix.errors import LayoutError
from vlmfix.insight.work import Work

FUNCTION_WORDS = frozenset(
    "a about above after again all am an and any are as at be because been before being below between both but by can "
    "could did do does doing down during each either else for from further had has have having he her here hers him "
    "his how i if in into is it its itself just may me might more most must my no nor not of off on once only or other "
    "our out over own please same shall she should so some such than that the their them then there these they this "
    "those through to too under until up us very was we were what when where which while who whom whose why will with "
    "would you your yours yes".split()
)
"""English words that name nothing; the others count as nouns, verbs, adjectives, adverbs and numbers."""


def decoded(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True
) -> tuple[str, tuple[int, ...]]:
    """Decodes some tokens, and finds where each token's characters end in the text.

    A character that several tokens write belongs to the first of them.

    Args:
        tokenizer: The model's.
        ids: The tokens.
        special: Whether to write special tokens; otherwise they have no characters.
    """

    def text(count: int) -> str:
        return str(
            tokenizer.decode(list(ids[:count]), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    lengths = [len(text(count + 1)) for count in range(len(ids))]
    # an incomplete character decodes to marks; the complete one replaces them, and may be shorter
    ends = list(accumulate(reversed(lengths), min))[::-1]
    return text(len(ids)), tuple(ends)


@dataclass(frozen=True, eq=False)
class Tail:
    """Holds the tokens and the text of a prompt behind its last image token.

    Attributes:
        columns: Column of each token.
        text: The decoded tokens.
        ends: For each token, where its characters end; they begin where the token before ends.
    """

    columns: tuple[int, ...]
    text: str
    ends: tuple[int, ...]

    @classmethod
    def of(cls, work: Work, row: int) -> Tail:
        """Makes the tail of one row; for a row without a picture, the whole text."""
        shown = work.layout.tokens[row].nonzero()
        start = int(shown[-1]) + 1 if len(shown) else 0
        columns = [column for column in work.layout.text[row].nonzero().squeeze(1).tolist() if column >= start]
        ids = work.batch["input_ids"][row, columns].tolist()
        return cls(tuple(columns), *decoded(work.vlm.processor.tokenizer, ids))

    def over(self, start: int, end: int) -> list[int]:
        """Returns the columns of the tokens that write some of the characters from ``start`` to ``end``."""
        begins = (0, *self.ends)
        spans = zip(self.columns, begins, self.ends, strict=False)
        return [column for column, first, last in spans if first < end and last > start]

    def find(self, words: str) -> int:
        """Finds where words begin in the text, the last time they occur.

        Raises:
            LayoutError: The words do not occur.
        """
        place = self.text.rfind(words)
        if place < 0:
            raise LayoutError(
                f"the prompt does not hold {words!r} behind its picture", "use a template that has the question there"
            )
        return place


def question_columns(work: Work, *, content: bool) -> Tensor:
    """Marks the tokens of each row's question.

    Args:
        work: The batch.
        content: Only tokens of content words; all of them when no word is one.

    Returns:
        (B, T) bool.

    Raises:
        LayoutError: A row's question is not behind its picture.
    """
    marked = torch.zeros_like(work.layout.text)
    for row, asked in enumerate(work.batch.prompts or ()):
        question = (asked or "").strip()
        tail = Tail.of(work, row)
        start = tail.find(question)
        words = [match for match in re.finditer(r"\w+", question) if match[0].lower() not in FUNCTION_WORDS]
        spans = [match.span() for match in words] if content and words else [(0, len(question))]
        for first, last in spans:
            marked[row, tail.over(start + first, start + last)] = True
    return marked
