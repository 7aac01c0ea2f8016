"""What changes from one decoder's answers to another's where no truth is known: words, lengths and named objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from vlmfix.errors import UsageError
from vlmfix.evals.benchmarks.words import words_of
from vlmfix.parsing import WORD
from vlmfix.view.marks import differences
from vlmfix.view.sheet import Said, Sheet


@dataclass(frozen=True)
class Changes:
    """The answers of one column beside those of the first, over the questions that both have answered.

    Pairs are of the first column and this one.

    Attributes:
        before: The first column's name.
        now: This column's name.
        answered: Questions that both have answered.
        same: Answers with the same words.
        shared: Share of all words that stand in both answers, from 0 to 1; None without words.
        longer: Answers of more words than the first column's.
        shorter: Answers of fewer.
        words: Mean numbers of words.
        objects: Mean numbers of COCO's objects that an answer names, each counted once.
        cut: Answers that were cut off.
        failed: Questions that failed, of all that were asked.
        dropped: Objects that only the first column names, with the number of answers.
        added: Objects that only this column names, with the number of answers.
    """

    before: str
    now: str
    answered: int
    same: int
    shared: float | None
    longer: int
    shorter: int
    words: tuple[float, float]
    objects: tuple[float, float]
    cut: tuple[int, int]
    failed: tuple[int, int]
    dropped: Counter[str]
    added: Counter[str]


def changes(sheet: Sheet) -> list[Changes]:
    """Holds every other column of a sheet to the first.

    Raises:
        UsageError: There is one column, or two have answered no question in common.
    """
    if len(sheet.columns) == 1:
        raise UsageError("there is one decoder, and nothing to compare it with", "give the folders of two runs or more")
    return [_changes(sheet, number) for number in range(1, len(sheet.columns))]


def _changes(sheet: Sheet, number: int) -> Changes:
    before, now = sheet.columns[0].label, sheet.columns[number].label
    asked = [(row.said[0], row.said[number]) for row in sheet.rows()]
    both = [(one, other) for one, other in asked if one and other and not one.failed and not other.failed]
    pairs = [(one.text, other.text) for one, other in both]
    if not pairs:
        raise UsageError(f"no question is answered by both {before} and {now}", "compare runs with the same prompts")
    spans = [differences(*pair) for pair in pairs]
    words = sum(len(WORD.findall(text)) for pair in pairs for text in pair)
    changed = sum(
        len(WORD.findall(text[start:end]))
        for pair, places in zip(pairs, spans, strict=True)
        for text, own in zip(pair, places, strict=True)
        for start, end in own
    )
    lengths = [(len(one.split()), len(other.split())) for one, other in pairs]
    named = [(_objects(one), _objects(other)) for one, other in pairs]
    return Changes(
        before=before,
        now=now,
        answered=len(pairs),
        same=sum(not one and not other for one, other in spans),
        shared=1 - changed / words if words else None,
        longer=sum(other > one for one, other in lengths),
        shorter=sum(other < one for one, other in lengths),
        words=_means(lengths),
        objects=_means((len(one), len(other)) for one, other in named),
        cut=(sum(one.cut for one, _ in both), sum(other.cut for _, other in both)),
        failed=(_failed(one for one, _ in asked), _failed(other for _, other in asked)),
        dropped=Counter(name for one, other in named for name in one - other),
        added=Counter(name for one, other in named for name in other - one),
    )


def _objects(text: str) -> set[str]:
    return {mention.node for mention in words_of(None).read(text).mentions}


def _means(pairs: Iterable[tuple[int, int]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return sum(first) / len(first), sum(second) / len(second)


def _failed(said: Iterable[Said | None]) -> int:
    return sum(answer is not None and bool(answer.failed) for answer in said)
