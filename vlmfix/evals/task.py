"""What an evaluation is: samples, a judge for one answer, counts that add up, and figures made of the counts.

Everything here works without a model. Counts add over samples, so one rule gives the figures of a run and of every
bootstrap draw: sum the counts of the drawn units, then divide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vlmfix.plugins import origin_of, plugins_of

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with its truth.

    Attributes:
        id: Unique within a run.
        image: File name below the pictures' folder, with forward slashes; None for a question without a picture.
        prompt: What the model is asked, literally.
        target: What the judge needs to know, in JSON values.
        group: Part of the benchmark that is reported by itself, such as a POPE split; empty when there is one.
        unit: What the bootstrap draws; samples that share it are drawn together. Empty stands for the picture.
    """

    id: str
    image: str | None
    prompt: str
    target: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    unit: str = ""

    def drawn_as(self) -> str:
        """Name of the unit that the bootstrap draws."""
        return self.unit or self.image or self.id


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge makes of one answer.

    Attributes:
        counts: Numbers that add up over samples, such as ``{"tp": 1, "answers": 1}``.
        right: Whether the answer is right; None when the benchmark has no such outcome.
        parsed: False when the answer could not be read; how it counts then is the benchmark's rule.
        note: What was understood, for people: "yes", or the words that are not in the picture.
    """

    counts: Mapping[str, float]
    right: bool | None = None
    parsed: bool = True
    note: str = ""


Judged = tuple[Sample, Verdict]


@dataclass(frozen=True, eq=False)
class Tally:
    """Counts of one arm by unit.

    Attributes:
        units: U names of what the bootstrap draws.
        counts: For each count its sum in every unit, (U,).
    """

    units: tuple[str, ...]
    counts: Mapping[str, Numbers]

    def sums(self) -> dict[str, Numbers]:
        """Totals over all units, each of shape ()."""
        return {name: np.asarray(values.sum()) for name, values in self.counts.items()}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run asks about.

    Attributes:
        samples: In the order in which they are asked and written.
        images: Folder of the pictures; None when no sample has one.
        about: What tells this data from other data, in JSON values: file names with digests, protocol, image list,
            seed, prompt. Two runs are comparable only when it is equal, paths left out.
    """

    samples: Sequence[Sample]
    images: Path | None
    about: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One benchmark's rules of scoring; its fields are the options that change a score.

    Class attributes:
        name: Name on the command line.
        better: For each figure that is a merit, which way is better; keyed by the last part of its name.
        shifts: Figures that a difference must be read with (yes-ratio, length), keyed like ``better``.
        max_new_tokens: Longest answer unless the user says otherwise.
    """

    name: ClassVar[str]
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]]
    shifts: ClassVar[tuple[str, ...]] = ()
    max_new_tokens: ClassVar[int]

    @classmethod
    def called(cls) -> str:
        """Returns what cards call it: its name, or the file and the class that it was read from."""
        origin = origin_of(cls)
        return cls.name if origin is None else origin.name

    def plugins(self) -> dict[str, str]:
        """Maps it to its distribution and version, or to its file's digest; nothing for vlmfix's own."""
        return plugins_of([type(self)])

    def options(self) -> dict[str, Any]:
        """The fields in JSON values; ``type(self)(**options)`` makes an equal task."""
        return asdict(self)

    @abstractmethod
    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Score one answer; depends on nothing else."""

    def judge_all(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Verdict]:
        """Score many answers; a task that runs a model of its own does it in batches here."""
        return [self.judge(sample, answer) for sample, answer in zip(samples, answers, strict=True)]

    def tally(self, judged: Sequence[Judged]) -> Tally:
        """Sum the counts in every unit; those of a group have the group's name and a slash before theirs.

        A task whose figures are not made of sums over samples (pairs of questions that must both be right) does more.
        """
        units = {name: number for number, name in enumerate(dict.fromkeys(s.drawn_as() for s, _ in judged))}
        counts: dict[str, Numbers] = {}
        for sample, verdict in judged:
            for name, value in verdict.counts.items():
                full = f"{sample.group}/{name}" if sample.group else name
                if full not in counts:
                    counts[full] = np.zeros(len(units))
                counts[full][units[sample.drawn_as()]] += value
        return Tally(tuple(units), counts)

    @abstractmethod
    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Turn sums into figures.

        Args:
            sums: Totals of every count, all of one shape: () for a run, (R,) for R bootstrap draws.

        Returns:
            Figures by name ("random/f1", "chair_i"), of the same shape; NaN where a denominator is zero.
        """

    @abstractmethod
    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """What ``results.json`` says about one arm, in JSON values; None for a figure without a value."""

    def details(self, judged: Sequence[Judged], answers: Sequence[str]) -> dict[str, Any]:
        """What ``report.json`` says beyond that: other parsers, positions, disagreements.

        Args:
            judged: Samples with their verdicts.
            answers: Their raw answers, in the same order.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Benchmark(Task):
    """A benchmark that another distribution or a file adds: rules of scoring, and where its questions come from.

    ``vlmfix eval NAME --questions PATH --images DIR`` asks them. Fields that are declared with ``parameter`` are
    options, ``vlmfix eval NAME:field=value``; they are str, bool, int or float, and a run's card keeps them.

    Class attributes:
        objective: The figure that ``vlmfix tune --task NAME`` improves, which ``better`` must know; empty when it
            cannot be tuned for. Figures whose names end in ``recall`` and ``length`` are guarded there.
    """

    objective: ClassVar[str] = ""

    @abstractmethod
    def read(self, *, questions: Path | None, images: Path | None) -> Workload:
        """Reads what is asked.

        Args:
            questions: File or folder that ``--questions`` names; None when it was left out.
            images: Folder that ``--images`` names; None when it was left out.

        Raises:
            UsageError: Something is missing, or given in vain.
            DataError: A file cannot be read.
        """


def ratio(above: Numbers, below: Numbers) -> Numbers:
    """Divide; NaN where the divisor is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below != 0, above / np.where(below != 0, below, 1), np.nan)


def plain(value: Numbers | float) -> float | None:
    """A figure as JSON holds it: a float, or None for one without a value."""
    number = float(value)
    return number if np.isfinite(number) else None
