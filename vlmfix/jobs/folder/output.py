"""Writes the folder of a run over pictures: answers, failures and the run card, consistent after any kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.card import Known, versions
from vlmfix.errors import DiedError
from vlmfix.jobs.journal import BEGUN, Journal
from vlmfix.jobs.ledger import Ledger, now
from vlmfix.jobs.lines import ANSWER, ANSWERS, CARD, FAILED, FAILURE, MARKS, PROGRESS
from vlmfix.seen import Seen
from vlmfix.settings import Settings
from vlmfix.shapes import COUNT, FLAG, OBJECT, TEXT, fields, list_of
from vlmfix.skips import Skips

RUN = fields(
    {
        "settings": OBJECT,
        "started": TEXT,
        "finished": FLAG,
        "sessions": list_of(fields({"peak_memory": COUNT})),
    },
    {"progress": PROGRESS},
)
"""Shape that the card of a run must have for the run to resume."""


@dataclass
class Totals:
    """Holds the totals of a folder of answers, over all starts.

    ``cut`` counts those that ``max_new_tokens`` ended, ``skips`` the tokens left to the clean row.
    """

    answers: int = 0
    failed: int = 0
    cut: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skips: Skips = field(default_factory=Skips)

    def count(self, answer: Mapping[str, Any]) -> None:
        """Adds an answer's line."""
        self.answers += 1
        self.cut += answer.get("finish") == "length"
        self.tokens += answer["tokens"]
        self.seconds += answer["seconds"]
        self.skips.count(answer.get("skipped"), answer["tokens"])

    def noted(self) -> dict[str, Any]:
        """Returns the totals as a card has them."""
        return {
            "answers": self.answers,
            "failed": self.failed,
            "cut": self.cut,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            **self.skips.noted(),
        }

    def noted_pace(self) -> float | None:
        """Returns ``ms_per_token`` as a card has it."""
        return None if self.ms_per_token is None else round(self.ms_per_token, 3)

    @property
    def ms_per_token(self) -> float | None:
        """Returns the milliseconds of the model's time per generated token; None before the first token."""
        return 1000 * self.seconds / self.tokens if self.tokens else None


def measured(settings: Settings) -> dict[str, Any]:
    """Returns what a session notes of what was measured of its answers' tokens; nothing where nothing was."""
    if settings.confidence is None:
        return {}
    return {"confidence": settings.confidence, "similarity": settings.similarity}


class OutputFolder(Ledger):
    """Writes answers, failures and run card of one run.

    Args:
        folder: Made when it is missing.
        settings: Settings that answers depend on, as far as they are known before the model is loaded.
        retry_failed: Treats failed questions as open; their lines leave the folder when a model begins to work.
    """

    card_name: ClassVar = CARD
    card_shape: ClassVar = RUN
    failure: ClassVar = "reason"

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, retry_failed: bool = False) -> None:
        super().__init__(folder, {ANSWERS: ANSWER, FAILED: FAILURE}, retry_failed=retry_failed)
        self._settings = dict(settings)
        self._finished = False
        self.notes: tuple[str, ...] = ()
        """What is to be said of the run; the card keeps it."""
        self.totals = Totals()
        self.done = Seen()
        """(image, prompt) pairs that have an answer or failed, and those that this start asks."""
        self.unreadable = Seen()
        """Pictures that could not be opened."""
        self.asked = self.left = 0
        """Questions of the run, and those of them that have neither an answer nor a failure; the job counts them."""
        self._at_work = False
        self._recent: list[dict[str, Any]] = []

    def new_card(self) -> dict[str, Any]:
        """Makes a card with the settings alone."""
        return {"settings": self._settings, "started": now(), "sessions": []}

    def go_on(self) -> None:
        """Refuses settings that differ from the card's."""
        self.refuse_other(self.card["settings"], self._settings)
        self._recent = self.card.get("progress", {}).get("recent", [])

    def read_back(self) -> None:
        """Counts the answers and failures of earlier starts."""
        self.journal = Journal(self.folder / BEGUN)
        for record in self.lines[ANSWERS]:
            self._count(record)
        for record in self.standing(FAILED, self.lines[FAILED]):
            self.totals.failed += 1
            if "prompt" in record:
                self.done.add((record["image"], record["prompt"]))
            else:
                self.unreadable.add(record["image"])

    def _stands(self, line: Mapping[str, Any]) -> bool:
        stands = super()._stands(line)
        if not stands:
            self.journal.forgive(line["image"])
        return stands

    def __exit__(self, *error: object) -> None:
        try:
            self.journal.close(died=any(isinstance(part, DiedError) for part in error))
            if self.card.get("finished"):
                self.journal.remove()
        finally:
            super().__exit__(*error)

    def _count(self, record: Mapping[str, Any]) -> None:
        self.done.add((record["image"], record["prompt"]))
        self.totals.count(record)

    def begin(
        self,
        model: Known,
        settings: Settings,
        *,
        batch_size: int,
        prompts_file: str | None,
        peak_memory: Callable[[], int],
    ) -> None:
        """Notes that a model starts to work on the folder; see ``Ledger.start_session``.

        Args:
            model: Identity of the model.
            settings: Settings that it was loaded with.
            batch_size: Rows per batch.
            prompts_file: The file that the questions come from, if any.
            peak_memory: Returns the most bytes held so far.
        """
        self._at_work, self._recent = True, []
        self.card.pop("merged", None)  # from now on a run writes here, whose answers no merge may replace
        self.start_session(
            model,
            settings,
            self.card["settings"],
            found={"decoder_facts": model.facts},
            session={
                "batch_size": batch_size,
                "prompts_file": prompts_file,
                "versions": versions(),
                **measured(settings),
            },
            peak_memory=peak_memory,
        )

    def answered(self) -> Iterator[tuple[str, str]]:
        """Reads the (image, prompt) pairs that have an answer from the file."""
        return ((record["image"], record["prompt"]) for record in self.lines[ANSWERS])

    def answer(self, record: Mapping[str, Any]) -> None:
        """Writes one answer."""
        self.lines[ANSWERS].append(record)
        self._count(record)

    def fail(self, image: str, reason: str, *, prompt: str | None = None) -> None:
        """Writes the reason why a picture, or one question about it, has no answer."""
        about = {} if prompt is None else {"prompt": prompt}
        self.lines[FAILED].append({"image": image, "reason": reason, **about})
        if prompt is None:
            self.unreadable.add(image)
        self.totals.failed += 1

    def finish(self) -> None:
        """Notes that every question was answered or failed, except those left open."""
        self._finished = not self.left_open
        self.left = len(self.left_open)

    def conclude(self) -> None:
        """Rewrites the card when nothing is left and it does not say so: a kill came first, or a shard is empty."""
        if not self.card.get("finished"):
            self.finish()
            self.save()

    def sum_up(self) -> None:
        """Writes the totals into the card, and how far the run is and lately was."""
        totals = self.totals
        if self._at_work:
            self._recent = [*self._recent, {"time": now(), "done": totals.answers + totals.failed}][-MARKS:]
        self.card |= {
            "updated": now(),
            "finished": self._finished,
            "progress": {"total": self.asked, "left": self.left, "recent": self._recent},
            "totals": totals.noted(),
            "ms_per_token": totals.noted_pace(),
            "peak_memory": max((session["peak_memory"] for session in self.card["sessions"]), default=0),
            "notes": list(self.notes),
        }
