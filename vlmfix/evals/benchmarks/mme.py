"""MME: two questions about every picture, one to be answered yes and one no; what counts most is both right.

The hallucination subset is existence, count, position and color; any other of the fourteen tasks that is there is
scored too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.yesno import PARSERS, Reading
from vlmfix.evals.inputs import Source, read_source
from vlmfix.evals.task import Judged, Numbers, Sample, Tally, Task, Verdict, Workload, plain, ratio
from vlmfix.parsing import told

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUITES = {"total": HALLUCINATION, "perception": PERCEPTION, "cognition": COGNITION}
"""Tasks whose scores are added up; ``total`` is the hallucination subset."""

SUFFIXES = (".jpg", ".png", ".jpeg")
QUESTIONS = 2  # about every picture


@dataclass(frozen=True, kw_only=True)
class Mme(Task):
    """MME's scores by the official script: 100 times acc plus 100 times acc+ for every task, 200 at most."""

    name: ClassVar = "mme"
    better: ClassVar = {"acc": "higher", "acc_plus": "higher", "score": "higher"}
    shifts: ClassVar = ("yes_ratio", "length")
    max_new_tokens: ClassVar = 128

    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Read yes or no off the first four characters; anything else is wrong, and unparsed."""
        reading = PARSERS["mme"].read(answer)
        right = str(reading) == sample.target["label"]
        parsed = reading is not Reading.NEITHER
        counts = {
            "right": float(right),
            "answers": 1.0,
            "yes": float(reading is Reading.YES),
            "unparsed": float(not parsed),
            "words": float(len(answer.split())),
        }
        return Verdict(counts=counts, right=right, parsed=parsed, note=str(reading))

    def tally(self, judged: Sequence[Judged]) -> Tally:
        """Counts by picture, pairs and right pairs among them; a pair of which one answer failed is no pair."""
        tally = super().tally(judged)
        row = {unit: number for number, unit in enumerate(tally.units)}
        pairs: dict[tuple[str, str], list[bool]] = {}
        for sample, verdict in judged:
            pairs.setdefault((sample.group, sample.drawn_as()), []).append(bool(verdict.right))
        counts = {f"{task}/{name}": np.zeros(len(row)) for task, _ in pairs for name in ("pairs", "both")}
        for (task, unit), right in pairs.items():
            if len(right) == QUESTIONS:
                counts[f"{task}/pairs"][row[unit]] += 1
                counts[f"{task}/both"][row[unit]] += all(right)
        return Tally(tally.units, {**tally.counts, **counts})

    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Acc, acc_plus, score, yes_ratio and length of every task, then of every suite; a suite's score is a sum."""
        tasks = _tasks(sums)
        found = {f"{task}/{name}": value for task in tasks for name, value in _scores(sums, [task]).items()}
        for suite, members in _suites(tasks).items():
            total = _scores(sums, members) | {"score": np.sum([found[f"{task}/score"] for task in members], axis=0)}
            found |= {f"{suite}/{name}": value for name, value in total.items()}
        return found

    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """By task, then by suite: acc, acc_plus, score, n and unparsed."""
        sums = self.tally(judged).sums()
        figures = self.figures(sums)
        tasks = _tasks(sums)
        rows = {task: [task] for task in tasks} | _suites(tasks)
        return {
            row: {name: plain(figures[f"{row}/{name}"]) for name in ("acc", "acc_plus", "score")}
            | {
                "n": int(_sum(sums, members, "answers")),
                "unparsed": int(_sum(sums, members, "unparsed")),
            }
            for row, members in rows.items()
        }


def _tasks(sums: Mapping[str, Numbers]) -> list[str]:
    return [name.removesuffix("/answers") for name in sums if name.endswith("/answers")]


def _suites(tasks: Sequence[str]) -> dict[str, list[str]]:
    """The hallucination subset as far as it is there, and the others where they are complete."""
    found: dict[str, list[str]] = {}
    for suite, members in SUITES.items():
        present = [task for task in members if task in tasks]
        if len(present) == len(members) or (present and suite == "total"):
            found[suite] = present
    return found


def _sum(sums: Mapping[str, Numbers], tasks: Iterable[str], name: str) -> Numbers:
    total: Numbers = np.sum([sums[f"{task}/{name}"] for task in tasks], axis=0)
    return total


def _scores(sums: Mapping[str, Numbers], tasks: Sequence[str]) -> dict[str, Numbers]:
    right, answers, yes, words, pairs, both = (
        _sum(sums, tasks, name) for name in ("right", "answers", "yes", "words", "pairs", "both")
    )
    acc, acc_plus = ratio(right, answers), ratio(both, pairs)
    return {
        "acc": acc,
        "acc_plus": acc_plus,
        "score": 100 * acc + 100 * acc_plus,
        "yes_ratio": ratio(yes, answers),
        "length": ratio(words, answers),
    }


def read(folder: Path, images: Path | None = None) -> Workload:
    """Read MME in one of its official layouts.

    For every task the folder holds either a folder of pictures and, beside them or in ``questions_answers_YN``, for
    each picture a text file with its two questions (question, tab, truth); or one file ``<task>.txt`` as the official
    script takes it (picture, tab, question, tab, truth, and an answer that is not looked at). Questions are asked as
    they are.

    Args:
        folder: The benchmark's folder.
        images: Folder of the tasks' folders of pictures; the same one unless given.

    Raises:
        DataError: No task is there, a line has another shape, or a picture has not exactly two questions.
    """
    images = folder if images is None else images
    samples: list[Sample] = []
    about: dict[str, Any] = {}
    for task in (*PERCEPTION, *COGNITION):
        files = _files(folder, task)
        if not files:
            continue
        sources = [read_source(path) for path in files]
        samples += _samples(task, sources, images, single=files == [folder / f"{task}.txt"])
        whole = hashlib.sha256("".join(f"{source.path.name} {source.sha256}\n" for source in sources).encode())
        about[task] = {"files": len(files), "sha256": whole.hexdigest()}
    if not samples:
        raise DataError(
            f"{folder} holds no task of MME",
            f"it needs {HALLUCINATION[0]} or another task, as a folder or as a .txt file",
        )
    return Workload(samples=samples, images=images, about={"tasks": about})


def _files(folder: Path, task: str) -> list[Path]:
    """Question files of a task, sorted; none when it is not there."""
    if os.path.isdir(folder / task):
        apart = folder / task / "questions_answers_YN"
        return sorted((apart if os.path.isdir(apart) else folder / task).glob("*.txt"))
    single = folder / f"{task}.txt"
    return [single] if os.path.isfile(single) else []


def _samples(task: str, sources: Sequence[Source], images: Path, *, single: bool) -> list[Sample]:
    """The questions of one task, those of a picture together.

    Raises:
        DataError: A picture has not exactly two.
    """
    questions: dict[str, list[tuple[str, str]]] = {}
    for source in sources:
        for picture, question, label in _lines(source, single=single):
            questions.setdefault(picture, []).append((question, label))
    for picture, asked in questions.items():
        if len(asked) != QUESTIONS:
            raise DataError(
                f"{sources[0].path.parent}: MME's {task} has {len(asked)} questions about {picture}, not {QUESTIONS}",
                "give the files as published",
            )
    return [
        Sample(
            id=f"{task}/{picture}/{number}",
            image=_image(images, task, picture, named=single),
            prompt=question,
            target={"label": label},
            group=task,
            unit=f"{task}/{picture}",
        )
        for picture, asked in questions.items()
        for number, (question, label) in enumerate(asked, start=1)
    ]


def _lines(source: Source, *, single: bool) -> Iterator[tuple[str, str, str]]:
    """(picture, question, truth) of every line; the file's own name is the picture unless the lines name theirs.

    Raises:
        DataError: A line has another shape.
    """
    shape = "picture, question and truth" if single else "question and truth"
    for number, line in enumerate(source.lines(), start=1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("\t")]
        where = f"{source.path}, line {number}"
        if len(parts) not in ((3, 4) if single else (2,)):
            raise DataError(f"{where} has {len(parts)} parts between tabs", f"it needs {shape}")
        picture, question, label = parts[:3] if single else (source.path.stem, *parts)
        if label.lower() not in ("yes", "no"):
            raise DataError(f"{where}: the truth is {told(label)}", "it must be Yes or No")
        yield picture, question, label.lower()


def _image(images: Path, task: str, picture: str, *, named: bool) -> str:
    """Path of a picture below the folder of pictures: the first place where it is, or else the first one there is."""
    names = [picture] if named else [f"{picture}{suffix}" for suffix in SUFFIXES]
    places = [f"{place}{name}" for place in (f"{task}/", f"{task}/images/", "") for name in names]
    return next((place for place in places if os.path.isfile(images / place)), places[0])
