"""Folders that `vlmfix eval` wrote, read to be looked at, with what the benchmark knows of each answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from vlmfix.evals.benchmarks.amber import DESCRIPTIONS, Amber
from vlmfix.evals.benchmarks.chair import Chair
from vlmfix.evals.benchmarks.clipscore import ClipScore
from vlmfix.evals.benchmarks.pope import Pope
from vlmfix.evals.record import Record, read_run
from vlmfix.evals.task import Sample, Task
from vlmfix.settings import decoding_text
from vlmfix.view.pictures import below
from vlmfix.view.runs import Answers, Asked, model_facts, session_facts
from vlmfix.view.sheet import Judgement, Kind, PictureFile, Said, Truth

YES = re.compile(r"\byes\b", re.IGNORECASE)


def read_evaluation(folder: Path, images: Path | None = None) -> Answers:
    """Reads a folder that ``vlmfix eval`` wrote, finished or not.

    Args:
        folder: The folder.
        images: Where its pictures are now; None for where they were.

    Raises:
        UsageError: Its answers are about several contents of one picture.
        DataError: A file is missing or is not what it should be.
    """
    run = read_run(folder)
    card = run.card
    digests = run.pictures()
    place = images or (None if card.get("images") is None else Path(card["images"]))
    pictures: dict[str, PictureFile] = {}
    asked = []
    for sample in run.samples:
        picture = None
        if sample.image is not None:
            where = None if place is None else below(place, sample.image)
            picture = pictures.setdefault(sample.image, PictureFile(sample.image, where, digests.get(sample.image, "")))
        said = {arm: _said(found[sample.id]) for arm, found in run.answers.items() if sample.id in found}
        asked.append(Asked(picture, sample.prompt, said, _truth(run.task, sample), sample.group))
    shared = model_facts(card) | {"decoding": decoding_text(card["decoding"])} | session_facts(card.get("sessions", ()))
    arms = {
        name: {"folder": str(folder), "benchmark": run.task.name, "decoder": about["spec"], **shared}
        | ({"state": "unfinished"} if run.missing(name) else {})
        for name, about in card["arms"].items()
    }
    return Answers(folder, arms, asked, f"vlmfix eval {run.task.name}")


def _said(record: Record) -> Said:
    skipped = None if record.skipped is None else (record.skipped, len(record.ids))
    return Said(record.answer or "", record.finish, record.failed, skipped=skipped)


def _truth(task: Task, sample: Sample) -> Truth | None:
    """What a benchmark knows of a sample; nothing where only another model could tell."""
    if isinstance(task, ClipScore):
        return None
    if isinstance(task, Chair):
        return Truth(f"In the picture: {_listed(task.truth(sample))}", partial(_caption, task, sample))
    if isinstance(task, Amber) and sample.group == DESCRIPTIONS:
        return Truth(f"In the picture: {_listed(sample.target['truth'])}", partial(_description, task, sample))
    judge = partial(_object, task, sample) if isinstance(task, Pope) else partial(_answer, task, sample)
    label = sample.target.get("label")
    return Truth(f"Right answer: {label}" if isinstance(label, str) else "", judge)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing that is known"


def _caption(task: Chair, sample: Sample, text: str) -> Judgement:
    found = task.mentions(sample, text)
    marks: list[tuple[int, int, Kind]] = [
        (mention.start, mention.end, "absent" if absent else "present") for mention, absent in found
    ]
    absent = tuple(dict.fromkeys(mention.node for mention, absent in found if absent))
    return Judgement(tuple(marks), absent, right=None)


def _description(task: Amber, sample: Sample, text: str) -> Judgement:
    absent = tuple(dict.fromkeys(filter(None, task.judge(sample, text).note.split(", "))))
    return Judgement(absent=absent)


def _object(task: Pope, sample: Sample, text: str) -> Judgement:
    """A question whether something is there: a yes to what is not names something absent."""
    verdict = task.judge(sample, text)
    if not verdict.counts["fp"] or sample.target["label"] != "no":
        return Judgement(right=verdict.right)
    yes = YES.search(text)
    marks: tuple[tuple[int, int, Kind], ...] = ((yes.start(), yes.end(), "absent"),) if yes else ()
    return Judgement(marks, absent=("what was asked for",), right=False)


def _answer(task: Task, sample: Sample, text: str) -> Judgement:
    return Judgement(right=task.judge(sample, text).right)
