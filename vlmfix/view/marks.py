"""Where answers differ, and texts cut in pieces at what is marked in them."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from vlmfix.parsing import WORD
from vlmfix.view.sheet import Kind, Word

LARGEST = 50_000
"""Pairs of equal words that are compared; of texts with more, which repeat themselves, all between equal beginnings and
ends differs."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A part of a text that is marked in one way.

    Attributes:
        text: The part.
        kind: ``present`` or ``absent`` when it names an object.
        differs: Whether another answer has other words there.
        word: The word that it is, or is a part of; None where nothing is known of it.
    """

    text: str
    kind: Kind = ""
    differs: bool = False
    word: Word | None = None


def differences(first: str, second: str) -> tuple[list[Span], list[Span]]:
    """Finds the words in which two texts differ; white space does not count.

    Returns:
        For each text the places of words that the other lacks there, in order.
    """
    places = [[found.span() for found in WORD.finditer(text)] for text in (first, second)]
    left, right = (
        [text[start:end] for start, end in spans] for text, spans in zip((first, second), places, strict=True)
    )
    begin = _common(left, right)
    end = _common(left[begin:][::-1], right[begin:][::-1])
    left, right = left[begin : len(left) - end], right[begin : len(right) - end]
    changes: Sequence[tuple[str, int, int, int, int]] = [("replace", 0, len(left), 0, len(right))]
    if _pairs(left, right) <= LARGEST:
        changes = SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    found: tuple[list[Span], list[Span]] = ([], [])
    for kind, *ends in changes:
        for spans, (start, stop), changed in zip(places, (ends[:2], ends[2:]), found, strict=True):
            if kind != "equal" and start < stop:
                changed.append((spans[begin + start][0], spans[begin + stop - 1][1]))
    return found


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of words with which both begin."""
    same = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        same += 1
    return same


def _pairs(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of ways to take an equal word from both, which is what comparing them takes."""
    counts = Counter(second)
    return sum(counts[word] for word in first)


def side_by_side(texts: Sequence[str | None]) -> list[list[Span]]:
    """Finds what to mark in several answers: of two, both sides; of more, what the first does not say.

    Args:
        texts: The answers; None where there is none.

    Returns:
        For each the places that differ.
    """
    found: list[list[Span]] = [[] for _ in texts]
    there = [number for number, text in enumerate(texts) if text is not None]
    for number in there[1:]:
        first, second = texts[there[0]], texts[number]
        if first is not None and second is not None:
            before, found[number] = differences(first, second)
            if len(there) == 2:
                found[there[0]] = before
    return found


def pieces(
    text: str,
    marks: Iterable[tuple[int, int, Kind]] = (),
    differing: Iterable[Span] = (),
    words: Sequence[Word] = (),
) -> list[Piece]:
    """Cuts a text where a mark begins or ends.

    Args:
        text: The text.
        marks: Places that name an object, apart from each other.
        differing: Places that another answer lacks, apart from each other.
        words: What is known of words, in order and apart from each other.

    Returns:
        Its pieces, which joined are the text.
    """
    marks, differing = list(marks), list(differing)
    begins = [word.begin for word in words]
    spans = [*differing, *((start, end) for start, end, _ in marks), *((word.begin, word.end) for word in words)]
    edges = {0, len(text), *(edge for span in spans for edge in span)}
    found = []
    for start, end in itertools.pairwise(sorted(edges)):
        kinds = [kind for first, last, kind in marks if first <= start < last]
        differs = any(first <= start < last for first, last in differing)
        place = bisect_right(begins, start) - 1
        word = words[place] if place >= 0 and start < words[place].end else None
        found.append(Piece(text[start:end], kinds[0] if kinds else "", differs, word))
    return found
