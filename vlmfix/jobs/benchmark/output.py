"""Writes the folder of a benchmark's run: answers of every arm, samples and run card, consistent after any kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.card import Known, versions, weights_digest
from vlmfix.decoders import Decoder
from vlmfix.errors import UsageError
from vlmfix.evals.record import (
    ANSWERS,
    CARD,
    COMPARISON,
    FORMAT,
    LINE,
    PLAIN,
    REPORT,
    RESULTS,
    RESUMABLE,
    SAMPLES,
    arm_folder,
    checked,
    digest,
    record,
    skips_of,
    without_names,
    write_samples,
)
from vlmfix.evals.task import Task, Workload
from vlmfix.files import remove_drafts, resolved
from vlmfix.jobs.ledger import Ledger, now
from vlmfix.language.parameters import plain
from vlmfix.records import read_lines
from vlmfix.settings import EMBEDDED, Settings
from vlmfix.skips import Skips


class ArmsFolder(Ledger):
    """Writes the answers of several decoders to the samples of one workload, and their run card.

    Arms that a folder already has stay; new ones are added.

    Args:
        folder: Made when it is missing.
        task: The rules of scoring.
        workload: Samples and pictures.
        settings: Model and generation settings; its ``decoder`` is not read.
        arms: Decoders by name.
        command: Shell command that starts the same run, for the card.
        retry_failed: Treats failed samples as open; their lines leave the folder when a model begins to work.

    Raises:
        UsageError: Two arms would share a folder.
    """

    card_name: ClassVar = CARD
    card_shape: ClassVar = RESUMABLE
    failure: ClassVar = "failed"
    unit: ClassVar = "samples"

    def __init__(
        self,
        folder: Path,
        task: Task,
        workload: Workload,
        settings: Settings,
        arms: Mapping[str, Decoder],
        command: str,
        *,
        retry_failed: bool,
    ) -> None:
        _refuse_shared_folders(arms)
        self._files = {arm: f"{arm_folder(arm)}/{ANSWERS}" for arm in arms}
        super().__init__(folder, dict.fromkeys(self._files.values(), LINE), retry_failed=retry_failed)
        self._samples = workload.samples
        self._arms = {name: _about(decoder) for name, decoder in arms.items()}
        self._command = command
        self._known: dict[str, Any] = {
            "format": FORMAT,
            "task": task.called(),
            "options": task.options(),
            "plugins": task.plugins() or None,
            "data": dict(workload.about),
            "samples": digest(workload.samples),
            "count": len(workload.samples),
            "images": None if workload.images is None else str(resolved(workload.images)),
            "model": settings.model,
            "revision": settings.revision,
            **settings.loaded(),
            "decoding": settings.decoding(),
        }
        self.done: dict[str, set[str]] = {}
        """Arm -> ids of the samples that have an answer or failed."""
        self._skips = {arm: Skips() for arm in arms}

    def new_card(self) -> dict[str, Any]:
        """Makes a card of data, settings and arms."""
        unknown = [name for name in (SAMPLES, RESULTS, REPORT, *COMPARISON) if os.path.exists(self.folder / name)]
        if unknown:
            raise UsageError(f"{self.folder} holds {', '.join(unknown)} but no {CARD}", "choose another --out")
        return self._known | {"arms": self._arms, "command": self._command, "sessions": []}

    def go_on(self) -> None:
        """Refuses data and settings that differ from the card's, and adds new arms."""
        moved = self._moved()
        data = {name: without_names(self._known[name]) for name in ("options", "data")}
        fixed = {name: value for name, value in self._known.items() if name not in (*data, *moved)}
        self.refuse_other(self.card, fixed)
        self.refuse_other({name: without_names(self.card[name]) for name in data}, data)
        self.card |= moved | {"options": self._known["options"]}
        former = self.card["arms"]
        both = {name: about for name, about in self._arms.items() if name in former}
        self.refuse_other({name: {key: former[name].get(key) for key in about} for name, about in both.items()}, both)
        added = {name: about for name, about in self._arms.items() if name not in former}
        self.refuse_unknown(self._files[name] for name in added)
        former |= added

    def _moved(self) -> dict[str, Any]:
        """Returns the card's entries for places, which may change: digests tell whether the content is the same."""
        moved = {"images": self._known["images"]}
        model, card = self._known["model"], self.card
        if model != card["model"] and card.get("commit") is None and os.path.isdir(EMBEDDED.get(model, Path(model))):
            if weights_digest(model, None) == card.get("weights"):
                moved["model"] = model
        return moved

    def read_back(self) -> None:
        """Finds the samples that earlier starts answered or failed to answer."""
        ids = {sample.id for sample in self._samples}
        for arm, name in self._files.items():
            lines = checked(self.folder / name, self.lines[name], ids)
            standing = [record(line) for line in self.standing(name, lines)]
            self.done[arm] = {found.id for found in standing}
            self._skips[arm] = skips_of(standing)

    def tidy(self) -> None:
        """Removes the drafts that a kill has left."""
        remove_drafts(self.folder, CARD, SAMPLES)

    def pictures(self) -> dict[str, str]:
        """Returns the digests of the pictures that the folder has answers about, of any arm."""
        lines = (line for arm in self.card["arms"] for line in read_lines(self.folder / arm_folder(arm) / ANSWERS))
        return {line["image"]: line["sha256"] for line in lines if "answer" in line and "sha256" in line}

    @property
    def batch_size(self) -> int | None:
        """Returns the rows per batch, the same in every start; None before the first."""
        rows: int | None = self.card.get("batch_size")
        return rows

    def begin(
        self, models: Mapping[str, Known], settings: Settings, *, batch_size: int, peak_memory: Callable[[], int]
    ) -> None:
        """Notes that a model starts to work on the folder, and writes the samples; see ``Ledger.start_session``.

        Args:
            models: Identity of the model for every arm; only the facts differ.
            settings: Settings that it was loaded with.
            batch_size: Rows per batch.
            peak_memory: Returns the most bytes held so far.
        """
        self._note_facts({name: dict(model.facts) for name, model in models.items()})
        # the card comes first: samples without a card would look like another job's
        self.start_session(
            models[PLAIN],
            settings,
            self.card,
            found={"batch_size": batch_size},
            session={"versions": versions(), "updated": now()},
            peak_memory=peak_memory,
        )
        write_samples(self.folder, self._samples)

    def _note_facts(self, facts: Mapping[str, dict[str, str]]) -> None:
        """Keeps the facts of new arms and compares the facts of resumed ones; an old card may have none."""
        arms = self.card["arms"]
        known = {name: {"facts": arms[name]["facts"]} for name in facts if self.done[name] and "facts" in arms[name]}
        self.refuse_other(known, {name: {"facts": facts[name]} for name in known})
        for name, own in facts.items():
            if not self.done[name]:
                arms[name]["facts"] = own

    def answered(self, arm: str) -> set[str]:
        """Reads the ids of an arm's samples that have an answer from its file."""
        return {line["id"] for line in self.lines[self._files[arm]] if self.failure not in line}

    def write(self, arm: str, line: Mapping[str, Any]) -> None:
        """Writes the line of an answer or of a failure."""
        self.lines[self._files[arm]].append(line)
        self.done[arm].add(line["id"])
        self._skips[arm].count(line.get("skipped"), len(line.get("ids", ())))

    def note(self, arm: str, tokens: int, seconds: float) -> None:
        """Adds to the tokens and seconds that an arm has taken in this start."""
        self.session.setdefault("arms", {})[arm] = {"tokens": tokens, "seconds": round(seconds, 3)}

    def sum_up(self) -> None:
        """Writes the time into the card, and what contrasts left to the clean row; the answers hold the rest."""
        self.session["updated"] = now()
        for arm, skips in self._skips.items():
            self.card["arms"][arm] |= skips.noted()


def _refuse_shared_folders(arms: Iterable[str]) -> None:
    """Refuses arms whose answers would share a path with each other or with another file of the run."""
    taken = dict.fromkeys((CARD, SAMPLES, RESULTS, REPORT), "a file of the run")
    for name in arms:
        folder = arm_folder(name)
        if folder in taken:
            raise UsageError(f"the arm {name} and {taken[folder]} would share the folder {folder}", "rename the arm")
        taken[folder] = f"the arm {name}"


def _about(decoder: Decoder) -> dict[str, Any]:
    about: dict[str, Any] = {
        "spec": decoder.spec(),
        "parameters": {name: plain(value) for name, value in decoder.parameters().items()},
    }
    if decoder.strategy:
        about["strategy"] = str(decoder.strategy)
    return about | {"plugins": decoder.plugins() or None}
