"""The folder that an evaluation writes: card, samples, and each arm's raw answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.evals.task import Judged, Sample, Task
from vlmfix.evals.tasks import TASKS
from vlmfix.records import read_json, read_lines, to_json

FORMAT = 1
"""Of the folder; raised when an older reader could not understand it."""
CARD, SAMPLES, ANSWERS = "card.json", "samples.jsonl", "answers.jsonl"
RESULTS, REPORT = "results.json", "report.json"
NEEDED = ("format", "task", "options", "samples", "arms", "data", "count", "model", "decoding")
"""What a card must say for its answers to be scored."""
PLAIN = "greedy"
"""Name of the plain arm, which every run has."""


@dataclass(frozen=True)
class Record:
    """One line of an arm's answers.

    Attributes:
        id: The sample's.
        answer: What the model said, raw; None when it failed.
        ids: Generated token ids, the end token included.
        finish: ``eos``, ``length`` or ``context``; empty when it failed.
        failed: Why there is no answer; empty when there is one.
        sha256: Hex digest of the picture's file; empty when there is none.
    """

    id: str
    answer: str | None
    ids: tuple[int, ...] = ()
    finish: str = ""
    failed: str = ""
    sha256: str = ""


@dataclass(frozen=True, eq=False)
class EvalRun:
    """A run as it lies on the disk.

    Attributes:
        folder: Where.
        card: What was run: data, model, decoding, arms, sessions.
        task: The rules of scoring that the run was made with.
        samples: What was asked, in order.
        answers: For each arm the records by sample id; an unfinished arm lacks some.
    """

    folder: Path
    card: dict[str, Any]
    task: Task
    samples: list[Sample]
    answers: dict[str, dict[str, Record]]

    def judged(self, arm: str) -> list[Judged]:
        """Samples of an arm that have an answer, with their verdicts, in order."""
        answered = self.answered(arm)
        verdicts = self.task.judge_all(answered, self.texts(arm))
        return list(zip(answered, verdicts, strict=True))

    def answered(self, arm: str) -> list[Sample]:
        """Samples of an arm that have an answer, in order."""
        found = self.answers[arm]
        return [sample for sample in self.samples if sample.id in found and not found[sample.id].failed]

    def texts(self, arm: str) -> list[str]:
        """Their raw answers, in the same order."""
        found = self.answers[arm]
        return [found[sample.id].answer or "" for sample in self.answered(arm)]

    def failed(self, arm: str) -> int:
        """Samples of an arm that failed."""
        return sum(bool(record.failed) for record in self.answers[arm].values())

    def missing(self, arm: str) -> int:
        """Samples of an arm that were not asked yet."""
        return len(self.samples) - len(self.answers[arm])


def read_run(folder: Path) -> EvalRun:
    """Read a run.

    Raises:
        DataError: The folder is not a run's, or a file in it was changed.
    """
    if not (folder / CARD).exists():
        raise DataError(f"{folder} holds no {CARD}", "give a folder that vlmfix eval wrote")
    card = read_json(folder / CARD)
    if lacking := [name for name in NEEDED if name not in card]:
        raise DataError(f"{folder / CARD} has no {', '.join(lacking)}", "give a folder that vlmfix eval wrote")
    if card["format"] != FORMAT or card["task"] not in TASKS:
        raise DataError(
            f"{folder / CARD} has format {card['format']!r} and task {card['task']!r}",
            f"this version reads format {FORMAT}",
        )
    try:
        samples = [Sample(**line) for line in read_lines(folder / SAMPLES)]
        task = TASKS[card["task"]](**card["options"])
    except TypeError as error:
        raise DataError(f"a file in {folder} was changed: {error}", "restore it, or run again") from error
    if digest(samples) != card["samples"]:
        raise DataError(f"{folder / SAMPLES} is not what the run asked", "restore the file, or run again")
    arms = {name: _records(folder / arm_folder(name) / ANSWERS) for name in card["arms"]}
    return EvalRun(folder, card, task, samples, arms)


def _records(path: Path) -> dict[str, Record]:
    try:
        return {line["id"]: record(line) for line in read_lines(path)}
    except KeyError as error:
        raise DataError(f"a line of {path} has no id", "restore the file, or run again") from error


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write what was asked; a reader sees the old file or the new one, never a part.

    Raises:
        DataError: The file cannot be written.
    """
    draft = folder / f".{SAMPLES}.new"
    try:
        draft.write_text("".join(f"{to_json(asdict(sample))}\n" for sample in samples), encoding="utf-8")
        draft.replace(folder / SAMPLES)
    except OSError as error:
        raise DataError(
            f"cannot write {folder / SAMPLES}: {error.strerror}", "free some space and start again"
        ) from error


def record(line: dict[str, Any]) -> Record:
    """One line of an answers file."""
    return Record(
        id=line["id"],
        answer=line.get("answer"),
        ids=tuple(line.get("ids", ())),
        finish=line.get("finish", ""),
        failed=line.get("failed", ""),
        sha256=line.get("sha256", ""),
    )


@cache
def arm_folder(name: str) -> str:
    """Folder of an arm: its name, with what a file name cannot hold taken out."""
    return name.replace("/", "_")


def digest(samples: Sequence[Sample]) -> str:
    """Which samples these are: sha256 of their lines."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(to_json(asdict(sample)).encode() + b"\n")
    return f"sha256:{whole.hexdigest()}"
