"""Answers side by side: which decoders said what about which picture, whoever wrote it down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

Kind = Literal["", "present", "absent"]
CUT = ("length", "context")
"""What an answer has for its end when it was not the model that ended it."""


@dataclass(frozen=True)
class Word:
    """What is known of one word of an answer.

    Attributes:
        begin: Where it begins in the text.
        end: Where it ends.
        probability: That of its tokens together, in [0, 1]; None where it is not known.
        heat: What the parts of the picture had to do with it, row by row, in hexadecimal digits from 0 to f; empty
            where it is not known.
        sar: Uncertainty weighted by relevance, of its tokens together; None where it is not known.
        flagged: Whether it names an object, was unsure and owes little to the picture.
    """

    begin: int
    end: int
    probability: float | None = None
    heat: str = ""
    sar: float | None = None
    flagged: bool = False


@dataclass(frozen=True)
class Said:
    """One answer, or why there is none.

    Attributes:
        text: The answer; empty when there is none.
        finish: ``eos``, ``stop``, ``length`` or ``context``; empty where it is not known.
        failed: Why there is no answer; empty when there is one.
        logprob: Mean natural log-probability of its tokens; None where it is not known.
        words: What is known of its words, in order and apart from each other.
        grid: Columns and rows of their heat.
        unsure: Whether it is among the least sure answers of its column.
        sar: Its uncertainty weighted by relevance; None where it is not known.
        skipped: How many tokens a contrast left to the clean row, and of how many; None where that is not known.
    """

    text: str
    finish: str = ""
    failed: str = ""
    logprob: float | None = None
    words: tuple[Word, ...] = ()
    grid: tuple[int, int] = (0, 0)
    unsure: bool = False
    sar: float | None = None
    skipped: tuple[int, int] | None = None

    @property
    def cut(self) -> bool:
        """Whether something else than the model ended the answer."""
        return self.finish in CUT


@dataclass(frozen=True)
class Judgement:
    """What the truth says of an answer.

    Attributes:
        marks: Places that name an object, as (start, end, whether it is present or absent), in order.
        absent: What it names that is not in the picture.
        right: Whether it is right; None where there is no such outcome.
    """

    marks: tuple[tuple[int, int, Kind], ...] = ()
    absent: tuple[str, ...] = ()
    right: bool | None = None


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of a picture and a question.

    Attributes:
        text: The truth in words; empty where it has none.
        judge: Holds an answer to it.
    """

    text: str
    judge: Callable[[str], Judgement]


@dataclass(frozen=True)
class Column:
    """The answers of one decoder in one folder.

    Attributes:
        label: Short name, unlike that of any other column.
        facts: What was run, by the names of the facts.
        summary: What its answers amount to, in sentences.
        folder: The folder; None for answers that were never written to one.
    """

    label: str
    facts: Mapping[str, str] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """One question with the answers of all columns.

    Attributes:
        prompt: What was asked.
        said: For each column what it said; None where it was not asked.
        truth: What is known, in words; empty when nothing is.
        judged: For each column how its answer compares with the truth; None without truth or answer.
        group: Part of the benchmark that the question belongs to.
    """

    prompt: str
    said: tuple[Said | None, ...]
    truth: str = ""
    judged: tuple[Judgement | None, ...] = ()
    group: str = ""

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """The names of the filters that let it through."""
        said = [answer for answer in self.said if answer is not None]
        judged = [judgement for judgement in self.judged if judgement is not None]
        found = {
            "differs": len({answer.text for answer in said if not answer.failed}) > 1,
            "absent": any(judgement.absent for judgement in judged),
            "wrong": any(judgement.right is False for judgement in judged),
            "failed": any(answer.failed for answer in said),
            "cut": any(answer.cut for answer in said),
            "unsure": any(answer.unsure for answer in said),
        }
        return tuple(name for name, holds in found.items() if holds)


@dataclass(frozen=True)
class PictureFile:
    """A picture as answers name it.

    Attributes:
        name: Path below the pictures' folder, with forward slashes.
        path: Where it should be; None when the name leads out of that folder.
        sha256: Digest of the bytes that the model was shown; empty where it is not known.
        part: Offset and length, in bytes, of a picture that stands in a tar file.
        url: Its address in the web, for one that is not on this machine.
        cell: Column and row of a picture that stands in a Parquet file.
    """

    name: str
    path: Path | None
    sha256: str = ""
    part: tuple[int, int] | None = None
    url: str = ""
    cell: tuple[str, int] | None = None


@dataclass(frozen=True, eq=False)
class Card:
    """One picture with all that was asked about it.

    Attributes:
        picture: The picture; None for questions without one.
        rows: The questions.
    """

    picture: PictureFile | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False)
class Sheet:
    """Everything that a page may show.

    Attributes:
        title: What the answers are, in a few words.
        columns: The decoders.
        cards: The pictures.
        notes: What a reader must know, in sentences.
    """

    title: str
    columns: tuple[Column, ...]
    cards: tuple[Card, ...]
    notes: tuple[str, ...] = ()

    def rows(self) -> Iterator[Row]:
        """All questions, in order."""
        for card in self.cards:
            yield from card.rows
