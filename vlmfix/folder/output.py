"""The folder that a run writes: answers, failures and the run card, in step after any kill."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from vlmfix.card import refuse_older_card
from vlmfix.errors import UsageError
from vlmfix.files import make_folder, remove_drafts
from vlmfix.records import JsonLines, read_json, refuse_other, replace_json
from vlmfix.shapes import COUNT, DURATION, FLAG, OBJECT, TEXT, fields, list_of

ANSWERS, FAILED, CARD = "answers.jsonl", "failed.jsonl", "run.json"
ANSWER = fields({"image": TEXT, "prompt": TEXT, "answer": TEXT, "tokens": COUNT, "seconds": DURATION}, {"sha256": TEXT})
FAILURE = fields({"image": TEXT, "reason": TEXT}, {"prompt": TEXT})
RUN = fields(
    {
        "settings": OBJECT,
        "started": TEXT,
        "finished": FLAG,
        "sessions": list_of(fields({"peak_memory": COUNT}), least=1),
    }
)
"""What the files of a run must hold for it to be gone on with."""

CARD_SECONDS = 30.0
"""The run card is at most this old while the run goes on."""


@dataclass
class Totals:
    """What a folder of answers amounts to, over all starts."""

    answers: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds of the model's time per generated token; None before the first."""
        return 1000 * self.seconds / self.tokens if self.tokens else None


class OutputFolder:
    """Answers, failures and run card of one run; holds the folder's lock while it is open.

    Args:
        folder: Made when it is missing.
        settings: What the answers depend on, as far as it is known before the model is loaded.
        retry_failed: Takes what failed for open; its lines leave the folder when a model begins to work.

    Raises:
        UsageError: Another process writes there, or the folder holds answers made with other settings.
        DataError: The folder or its files cannot be read or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, retry_failed: bool = False) -> None:
        self.folder = folder
        self._retry_failed = retry_failed
        self.totals = Totals()
        self.done: set[tuple[str, str]] = set()
        """(image, prompt) pairs that have an answer or failed."""
        self.unreadable: set[str] = set()
        """Pictures that could not be opened."""
        make_folder(folder)
        with ExitStack() as opened:
            self._answers = opened.enter_context(JsonLines(folder / ANSWERS, ANSWER))
            self._failed = opened.enter_context(JsonLines(folder / FAILED, FAILURE))
            self._card = self._card_of(settings)  # nothing is changed before the card has shown whose the folder is
            self._read_back()
            self._answers.claim()
            self._failed.claim()
            remove_drafts(folder, CARD)
            self._files = opened.pop_all()
        self._saved = 0.0

    def _read_back(self) -> None:
        for record in self._answers:
            self._count(record)
        for record in self._failed:
            if self._retry_failed:
                continue
            self.totals.failed += 1
            if "prompt" in record:
                self.done.add((record["image"], record["prompt"]))
            else:
                self.unreadable.add(record["image"])

    def _count(self, record: Mapping[str, Any]) -> None:
        self.done.add((record["image"], record["prompt"]))
        self.totals.answers += 1
        self.totals.tokens += record["tokens"]
        self.totals.seconds += record["seconds"]

    def _card_of(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        path = self.folder / CARD
        if path.exists():
            card = read_json(path, RUN)
            refuse_other(self.folder, path, card["settings"], settings)
            return card
        if not (self._answers.is_empty and self._failed.is_empty):
            raise UsageError(f"{self.folder} holds answers but no {CARD}", "choose another --out")
        return {"settings": dict(settings), "started": _now(), "sessions": []}

    def begin(self, settings: Mapping[str, Any], session: Mapping[str, Any]) -> None:
        """Notes that a model starts to work on the folder.

        Args:
            settings: What is known of the settings only now that the model is loaded.
            session: Versions, device and the like, which may differ from start to start.

        Raises:
            UsageError: The folder's answers were made with other weights, another precision or another profile.
        """
        if self._card["sessions"]:
            refuse_older_card(self.folder, self._card["settings"])
        known = {name: value for name, value in self._card["settings"].items() if name in settings}
        refuse_other(self.folder, self.folder / CARD, known, {name: settings[name] for name in known})
        if not self._card["sessions"]:  # what an earlier start did not note cannot be known of its answers
            self._card["settings"].update(settings)
        if self._retry_failed:
            self._failed.keep(lambda record: False)
        self._card["sessions"].append({"started": _now(), **session, "peak_memory": 0})
        self.save(finished=False)

    def answered(self) -> Iterator[tuple[str, str]]:
        """The (image, prompt) pairs that have an answer, read from the file."""
        return ((record["image"], record["prompt"]) for record in self._answers)

    def answer(self, record: Mapping[str, Any]) -> None:
        """Writes one answer."""
        self._answers.append(record)
        self._count(record)

    def fail(self, image: str, reason: str, *, prompt: str | None = None) -> None:
        """Writes why a picture, or one question about it, has no answer."""
        about = {} if prompt is None else {"prompt": prompt}
        self._failed.append({"image": image, "reason": reason, **about})
        self.totals.failed += 1

    def save(self, *, finished: bool, peak_memory: int = 0) -> None:
        """Rewrites the run card with the totals so far.

        Args:
            finished: Whether every picture has been dealt with.
            peak_memory: The most bytes that this session has held.
        """
        totals = self.totals
        if self._card["sessions"]:
            self._card["sessions"][-1]["peak_memory"] = peak_memory
        self._card |= {
            "updated": _now(),
            "finished": finished,
            "totals": {
                "answers": totals.answers,
                "failed": totals.failed,
                "tokens": totals.tokens,
                "seconds": round(totals.seconds, 3),
            },
            "ms_per_token": None if totals.ms_per_token is None else round(totals.ms_per_token, 3),
            "peak_memory": max((session["peak_memory"] for session in self._card["sessions"]), default=0),
        }
        replace_json(self.folder / CARD, self._card)
        self._saved = time.monotonic()

    def conclude(self) -> None:
        """Rewrites the run card when an earlier start did all the work and was killed before it had said so."""
        if not self._card["finished"]:
            self.save(finished=True, peak_memory=self._card["sessions"][-1]["peak_memory"])

    @property
    def card_is_old(self) -> bool:
        """Whether the run card should be rewritten."""
        return time.monotonic() - self._saved > CARD_SECONDS

    def close(self) -> None:
        """Closes the files and gives the lock back."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
