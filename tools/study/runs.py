"""Evaluations whose arms are answered by several processes and end up in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from tools.study.clock import Clock
from vlmfix.card import weights_digest
from vlmfix.decoders import Decoder
from vlmfix.evals.record import ANSWERS, CARD, PLAIN, SAMPLES, EvalRun, arm_folder, read_run
from vlmfix.evals.task import Task, Workload
from vlmfix.generation import VLM, load
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.records import read_json, refuse_other, replace_json
from vlmfix.settings import EMBEDDED, Settings

PARTS = "parts"
"""Folder beside a run, with one run for each arm that is being answered."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """One benchmark for one model.

    Attributes:
        folder: Of the run.
        task: The rules of scoring.
        workload: Samples and pictures.
        settings: Model and generation settings.
        batch_size: Rows at a time.
    """

    folder: Path
    task: Task
    workload: Workload
    settings: Settings
    batch_size: int

    def at(self, folder: Path) -> Exam:
        """The same in another folder."""
        return replace(self, folder=folder)

    def part(self, arm: str) -> Exam:
        """Where one arm is answered before it is taken into the run."""
        return self.at(self.folder.with_name(f"{self.folder.name}.{PARTS}") / arm_folder(arm))

    def has(self, arm: str, decoder: Decoder) -> bool:
        """Whether the run has the arm.

        Raises:
            UsageError: It was made with another decoder of that name.
        """
        if not (self.folder / CARD).exists():
            return False
        arms = read_json(self.folder / CARD)["arms"]
        if arm not in arms:
            return False
        refuse_other(self.folder, self.folder / CARD, {arm: arms[arm]["spec"]}, {arm: decoder.spec()})
        return True

    def begun(self) -> bool:
        """Whether plain decoding is answered."""
        return (self.folder / CARD).exists() and self.run().missing(PLAIN) == 0

    def run(self) -> EvalRun:
        """What is on the disk."""
        return read_run(self.folder)


@lru_cache(maxsize=len(EMBEDDED))
def loaded(model: str, **how: Any) -> VLM:
    """A model, kept for the next job of the process."""
    chatter: Any = transformers_logging
    chatter.disable_progress_bar()
    return load(model, **how)


def answered(exam: Exam, arms: Mapping[str, Decoder], clock: Clock) -> EvalRun:
    """Answers arms, and plain decoding, in the exam's own folder; goes on with what is there.

    Raises:
        UsageError: A decoder cannot act on the model, or the folder holds another run.
        DataError: Pictures are missing.
        OutOfTimeError: The time is over.
    """
    return evaluate(
        exam.folder,
        exam.task,
        exam.workload,
        exam.settings,
        arms,
        batch_size=exam.batch_size,
        command="python -m tools.study",
        report=clock.report,
        loader=loaded,
    )


def answer_plain(exam: Exam, clock: Clock) -> None:
    """Answers plain decoding, which every arm is compared with.

    Raises:
        UsageError: The folder was made with other weights under the model's name.
        OutOfTimeError: The time is over.
    """
    card = exam.folder / CARD
    if card.exists() and "weights" in (before := read_json(card)):
        now = {"weights": weights_digest(exam.settings.model, exam.settings.revision)}
        refuse_other(exam.folder, card, before, now)
    exam.folder.parent.mkdir(parents=True, exist_ok=True)
    answered(exam, {}, clock)


def answer_arm(exam: Exam, arm: str, decoder: Decoder, clock: Clock) -> None:
    """Answers one arm in a folder of its own; ``take_in`` brings it into the run.

    Raises:
        UsageError: The decoder cannot act on the model.
        OutOfTimeError: The time is over.
    """
    if not exam.has(arm, decoder):
        copy_plain(exam, exam.part(arm))
        answered(exam.part(arm), {arm: decoder}, clock)


def copy_plain(exam: Exam, other: Exam) -> None:
    """Begins a run with the plain answers of another, unless it is begun; the card, which says so, comes last."""
    if (other.folder / CARD).exists():
        return
    shutil.rmtree(other.folder, ignore_errors=True)
    (other.folder / PLAIN).mkdir(parents=True)
    for name in (SAMPLES, f"{PLAIN}/{ANSWERS}"):
        shutil.copyfile(exam.folder / name, other.folder / name)
    card = read_json(exam.folder / CARD)
    replace_json(other.folder / CARD, card | {"arms": {PLAIN: card["arms"][PLAIN]}, "sessions": []})


def take_in(exam: Exam, arm: str) -> None:
    """Brings an arm that was answered apart into the run, if there is one; one process alone may do this."""
    part = exam.part(arm).folder
    if not (part / CARD).exists():
        return
    own = exam.folder / arm_folder(arm)
    own.mkdir(exist_ok=True)
    shutil.copyfile(part / arm_folder(arm) / ANSWERS, own / ANSWERS)
    card, fresh = read_json(exam.folder / CARD), read_json(part / CARD)
    arms = card["arms"] | {arm: fresh["arms"][arm]}
    replace_json(exam.folder / CARD, card | {"arms": arms, "sessions": card["sessions"] + fresh["sessions"]})
    shutil.rmtree(part)


def figures(run: EvalRun, arm: str) -> dict[str, Any]:
    """An arm's figures by name; NaN for one without a value."""
    sums = run.task.tally(run.judged(arm)).sums()
    return {name: float(value) for name, value in run.task.figures(sums).items()}
