"""HallusionBench: questions about charts and illusions, each asked of several figures, edited ones among them.

Officially a language model judges the answers. Its judgements are taken from files that it filled before; without
them the words yes and no in the answer are compared with the truth. Nothing is asked over a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.yesno import PARSERS, Reading
from vlmfix.evals.inputs import Entry, read_source
from vlmfix.evals.task import Judged, Numbers, Sample, Tally, Task, Verdict, Workload, plain, ratio
from vlmfix.parsing import told

WRONG, RIGHT, UNCLEAR = 0, 1, 2
"""Judgements, as the official files hold them."""

IDENTITY = ("category", "subcategory", "set_id", "figure_id", "question_id")
ANSWER, JUDGEMENT = "model_prediction", "gpt4v_output_gpt_check"
"""Fields that the official evaluation adds to a question: the answer, and what the judge made of it."""

GROUPED = ("fAcc", "qAcc", "easy", "hard")
"""Figures that count groups of questions of which every one must be right."""
COUNTS = ("right", "answers", "yes", "unparsed", "words")


@dataclass(frozen=True, kw_only=True)
class Hallusion(Task):
    """HallusionBench's scores.

    Attributes:
        judged_by: ``string`` reads yes or no out of the answer and compares it with the truth; ``file`` looks the
            answer up in judgements made before.
    """

    name: ClassVar = "hallusion"
    better: ClassVar = {"aAcc": "higher", "fAcc": "higher", "qAcc": "higher", "easy": "higher", "hard": "higher"}
    shifts: ClassVar = ("yes_ratio", "length")
    max_new_tokens: ClassVar = 128

    judged_by: str = "string"

    def __post_init__(self) -> None:
        if self.judged_by not in ("string", "file"):
            raise UsageError(f"no judge is called {self.judged_by!r}", "use string or file")

    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Judge an answer as wrong, right or unclear.

        Unclear is right for a question that goes without its figure, and wrong otherwise; it counts as unparsed. An
        answer that no judgement in the file is about is unclear.
        """
        reading = PARSERS["vlmevalkit"].read(answer)
        if self.judged_by == "file":
            judgement = sample.target["judgements"].get(answer.strip(), UNCLEAR)
        else:
            judgement = UNCLEAR if reading is Reading.NEITHER else int(str(reading) == sample.target["label"])
        right = judgement == RIGHT or (judgement == UNCLEAR and bool(sample.target["unclear_is_right"]))
        yes, words = reading is Reading.YES, len(answer.split())
        values = (right, 1, yes, judgement == UNCLEAR, words)
        counts = {name: float(value) for name, value in zip(COUNTS, values, strict=True)}
        note = ("wrong", "right", "unclear")[judgement]
        return Verdict(counts=counts, right=right, parsed=judgement != UNCLEAR, note=note)

    def tally(self, judged: Sequence[Judged]) -> Tally:
        """Counts by set of questions, groups and right groups among them; a group of which an answer failed is none."""
        tally = super().tally(judged)
        row = {unit: number for number, unit in enumerate(tally.units)}
        groups: dict[tuple[str, str, int, str], list[bool]] = {}
        for sample, verdict in judged:
            for figure, (name, size) in sample.target["groups"].items():
                groups.setdefault((figure, name, size, sample.drawn_as()), []).append(bool(verdict.right))
        names = (*COUNTS, *(f"{figure} {kind}" for figure in GROUPED for kind in ("groups", "right")))
        counts = {name: np.zeros(len(row)) for name in names} | dict(tally.counts)
        for (figure, _, size, unit), right in groups.items():
            if len(right) == size:
                counts[f"{figure} groups"][row[unit]] += 1
                counts[f"{figure} right"][row[unit]] += all(right)
        return Tally(tally.units, counts)

    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Over questions, figures and groups of questions; easy and hard are groups without and of edited figures."""
        return {
            "aAcc": ratio(sums["right"], sums["answers"]),
            **{figure: ratio(sums[f"{figure} right"], sums[f"{figure} groups"]) for figure in GROUPED},
            "yes_ratio": ratio(sums["yes"], sums["answers"]),
            "length": ratio(sums["words"], sums["answers"]),
        }

    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """aAcc, fAcc, qAcc, easy, hard, n and unparsed."""
        sums = self.tally(judged).sums()
        figures = self.figures(sums)
        return {name: plain(figures[name]) for name in ("aAcc", *GROUPED)} | {
            "n": int(sums["answers"]),
            "unparsed": int(sums["unparsed"]),
        }


def read(questions: Path, images: Path, *, judgements: Sequence[Path] = ()) -> Workload:
    """Read ``HallusionBench.json``. Questions are asked as they are; those without a figure go without a picture.

    Args:
        questions: The benchmark's file.
        images: Folder of the pictures, with the folders VD and VS.
        judgements: Files as the official evaluation writes them: questions with the answer in ``model_prediction`` and
            0, 1 or 2 in ``gpt4v_output_gpt_check``. Those of several runs may be given together.

    Raises:
        DataError: A file has another shape, a question stands there twice, or a judgement is about none of them.
    """
    source = read_source(questions)
    entries = list(source.entries())
    for entry in entries:
        _check(entry)
    if not entries:
        raise DataError(f"{questions} has no question", "give HallusionBench.json as published")
    sizes = Counter(group for entry in entries for group in _groups(entry).items())
    samples = {_name(entry, *IDENTITY): _sample(entry, sizes) for entry in entries}
    if len(samples) < len(entries):
        twice = Counter(_name(entry, *IDENTITY) for entry in entries).most_common(1)[0][0]
        raise DataError(f"{questions} has the question {twice} twice", "give HallusionBench.json as published")
    about: dict[str, Any] = {"questions": source.about()}
    if judgements:
        about["judgements"] = [read_source(path).about() for path in judgements]
    return Workload(samples=judged_before(list(samples.values()), judgements), images=images, about=about)


def judged_before(samples: Sequence[Sample], judgements: Sequence[Path]) -> list[Sample]:
    """Give samples the judgements of their answers.

    Args:
        samples: As `read` makes them.
        judgements: Files as `read` takes them.

    Raises:
        DataError: A file has another shape, or is about other questions.
    """
    found: dict[str, dict[str, int]] = {sample.id: dict(sample.target["judgements"]) for sample in samples}
    for path in judgements:
        for entry in read_source(path).entries():
            entry.require(*IDENTITY, ANSWER, JUDGEMENT)
            name, said, judgement = _name(entry, *IDENTITY), entry.fields[ANSWER], entry.identity(JUDGEMENT)
            if name not in found:
                raise DataError(f"{entry.where} is about {name}, which is no question of this run", "give its own file")
            if not isinstance(said, str) or judgement not in ("0", "1", "2"):
                raise DataError(
                    f"{entry.where}: the judgement is {told(judgement)} of {told(said)}",
                    "it must be 0, 1 or 2 of a text",
                )
            found[name][said.strip()] = int(judgement)
    return [replace(sample, target={**sample.target, "judgements": found[sample.id]}) for sample in samples]


def _check(entry: Entry) -> None:
    entry.require(*IDENTITY, "visual_input", "question", "gt_answer")
    entry.text("question")
    for name, allowed in (("category", ("VD", "VS")), ("visual_input", ("0", "1", "2")), ("gt_answer", ("0", "1"))):
        if entry.identity(name) not in allowed:
            raise DataError(
                f"{entry.where}: {name} is {told(entry.fields[name])}", f"it must be {' or '.join(allowed)}"
            )


def _name(entry: Entry, *fields: str) -> str:
    return "/".join(entry.identity(field) for field in fields)


def _groups(entry: Entry) -> dict[str, str]:
    """For each figure of `GROUPED` the group that a question belongs to; none where it does not count."""
    asked = _name(entry, "category", "subcategory", "set_id", "question_id")
    found = {"qAcc": asked, "hard" if str(entry.fields["visual_input"]) == "2" else "easy": asked}
    if not _figureless(entry):
        found["fAcc"] = _name(entry, "category", "subcategory", "set_id", "figure_id")
    return found


def _figureless(entry: Entry) -> bool:
    """Whether a question is asked without the figure that would supplement it."""
    return entry.fields["category"] == "VS" and str(entry.fields["figure_id"]) == "0"


def _sample(entry: Entry, sizes: Mapping[tuple[str, str], int]) -> Sample:
    folder, figure = _name(entry, "category", "subcategory"), _name(entry, "figure_id")
    shown = str(entry.fields["visual_input"]) != "0"
    return Sample(
        id=_name(entry, *IDENTITY),
        image=f"{folder}/{entry.fields['set_id']}_{figure}.png" if shown else None,
        prompt=entry.fields["question"],
        target={
            "label": "yes" if str(entry.fields["gt_answer"]) == "1" else "no",
            "unclear_is_right": _figureless(entry),
            "groups": {name: [group, sizes[name, group]] for name, group in _groups(entry).items()},
            "judgements": {},
        },
        unit=_name(entry, "category", "subcategory", "set_id"),
    )
