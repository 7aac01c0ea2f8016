"""Keeps a job's ledger, which says whose its folder is and which starts wrote it, so that the next start can resume."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from vlmfix.card import Known, model_files, refuse_older_card, weights_digest
from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.files import make_folder, remove_drafts
from vlmfix.images import Found, open_found
from vlmfix.records import JsonLines, read_json, refuse_other, replace_json
from vlmfix.settings import Settings
from vlmfix.shapes import Shape
from vlmfix.supply import Question

CARD_SECONDS = 30.0
"""Greatest age of the card while a model answers."""


class CardFolder(ABC):
    """Guards a folder that one process at a time may write, and whose card says which job its lines belong to.

    ``with`` opens it: it takes the files' locks first, and changes nothing before the card has shown that the folder
    is this job's or nobody's.

    Args:
        folder: Made when it is missing.
        files: Path below the folder -> shape that each line of the file must have.

    Class attributes:
        card_name: Name of the card.
        card_shape: Shape that the card must have for the job to resume.
        holds: Noun for the lines, for messages.
        option: The option of the command line that names the folder, for hints.

    Raises:
        UsageError: Another process writes there, or the folder's content was made with other settings.
        DataError: The folder or its files cannot be read or written.
    """

    card_name: ClassVar[str]
    card_shape: ClassVar[Shape]
    holds: ClassVar[str] = "answers"
    option: ClassVar[str] = "--out"

    def __init__(self, folder: Path, files: Mapping[str, Shape]) -> None:
        self.folder = folder
        self._shapes = dict(files)

    def __enter__(self) -> Self:
        make_folder(self.folder)
        with ExitStack() as opened:
            self.lines = {name: opened.enter_context(self._opened(name)) for name in self._shapes}
            if os.path.exists(self._path):
                self.card = read_json(self._path, self.card_shape)
                self.go_on()
            else:
                self.refuse_unknown(self.lines)
                self.card = self.new_card()
            self.read_back()
            for lines in self.lines.values():
                lines.claim()
            self.tidy()
            self._opened_files = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened_files.close()

    @property
    def _path(self) -> Path:
        return self.folder / self.card_name

    def _opened(self, name: str) -> JsonLines:
        parent = (self.folder / name).parent
        if parent != self.folder:
            if os.path.islink(parent):
                raise DataError(
                    f"{parent} is a link, and nothing is written through links", f"choose another {self.option}"
                )
            make_folder(parent)
        return JsonLines(self.folder / name, self._shapes[name])

    @abstractmethod
    def new_card(self) -> dict[str, Any]:
        """Makes the card of a folder that is nobody's yet, to be written later.

        Raises:
            UsageError: The folder holds files that only a card could explain.
        """

    @abstractmethod
    def go_on(self) -> None:
        """Compares the card with this job.

        Raises:
            UsageError: The card is another job's.
        """

    @abstractmethod
    def read_back(self) -> None:
        """Reads the lines that earlier starts have written."""

    def tidy(self) -> None:
        """Removes the drafts that a kill has left."""
        remove_drafts(self.folder, self.card_name)

    def refuse_unknown(self, files: Iterable[str]) -> None:
        """Refuses files that have content when there is no card to explain it.

        Args:
            files: Their paths below the folder.

        Raises:
            UsageError: A file is not empty.
        """
        if unknown := [self.lines[name].path for name in files if not self.lines[name].is_empty]:
            raise UsageError(
                f"{unknown[0]} holds {self.holds} but no {self.card_name} says which", f"choose another {self.option}"
            )

    def refuse_other(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuses settings other than the card's; see ``records.refuse_other``."""
        refuse_other(self.folder, self._path, before, now, holds=self.holds, option=self.option)

    def write_card(self) -> None:
        """Writes the card as it is now.

        Raises:
            DataError: The file cannot be written.
        """
        replace_json(self._path, self.card)


class Ledger(CardFolder):
    """Writes the folder of a job with a model: answers and failures, and a card that lists every start as a session.

    When trouble of the machine keeps questions from being answered, a start leaves them to a later one, and notes them
    in ``left_open``.

    Args:
        folder: Made when it is missing.
        files: Path below the folder -> shape that each line of the file must have.
        retry_failed: Asks failed questions again; their lines leave the files when a model begins to work.

    Class attributes:
        failure: Field that the line of a failure has, and no line of an answer.
        unit: Noun for a question left open, for messages.
    """

    failure: ClassVar[str]
    unit: ClassVar[str] = "questions"

    def __init__(self, folder: Path, files: Mapping[str, Shape], *, retry_failed: bool) -> None:
        super().__init__(folder, files)
        self._retry_failed = retry_failed
        self._retried: set[str] = set()
        self._peak_memory: Callable[[], int] | None = None
        self._saved = 0.0
        self.left_open: list[tuple[str, PassingError]] = []
        """Questions left open, in words, each with the trouble."""

    @abstractmethod
    def sum_up(self) -> None:
        """Updates the card's figures about the answers."""

    @property
    def session(self) -> dict[str, Any]:
        """Returns the card's entry of this start, or of the last one."""
        session: dict[str, Any] = self.card["sessions"][-1]
        return session

    def standing(self, name: str, lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the lines of a file, except failures that are to be asked again.

        Args:
            name: The file's path below the folder.
            lines: The file's lines.
        """
        for line in lines:
            if self._stands(line):
                yield line
            else:
                self._retried.add(name)

    def _stands(self, line: Mapping[str, Any]) -> bool:
        return not (self._retry_failed and self.failure in line)

    def start_session(
        self,
        model: Known,
        settings: Settings,
        noted: dict[str, Any],
        *,
        found: Mapping[str, Any],
        session: Mapping[str, Any],
        peak_memory: Callable[[], int],
    ) -> None:
        """Notes that a model starts to work, and drops the failures that are to be asked again.

        Args:
            model: Identity of the model.
            settings: Settings that it was loaded with.
            noted: The part of the card that keeps the facts that decide answers; ``found`` is compared with it, and
                added to it only in the first session: facts not noted then cannot be known of its answers.
            found: Facts that decide the answers, beside the model's files, and are known only now.
            session: Facts that may differ from start to start.
            peak_memory: Returns the most bytes held so far.

        Raises:
            UsageError: The folder's answers were made with other weights or files of the model, in another precision or
                with other facts, or by a version that did not note these.
        """
        begun = bool(self.card["sessions"])
        if begun:
            refuse_older_card(self.folder, noted)
        found = {**facts_of(model, settings), **found}
        before = {name: noted[name] for name in found if name in noted}
        self.refuse_other(before, {name: found[name] for name in before})
        if not begun:
            noted.update(found)
        self._peak_memory = peak_memory
        self.card["sessions"].append({"started": now(), "device": model.device, **session})
        for name in self._retried:
            self.lines[name].keep(self._stands)
        self.save()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Rewrites the card when the work ends, in whatever way.

        Raises:
            PassingError: Trouble of the machine has left questions open.
        """
        try:
            yield
        finally:
            self.save()
        if self.left_open:
            first, trouble = self.left_open[0]
            raise PassingError(
                f"{len(self.left_open)} {self.unit} are left open, the first {first}: {trouble.message}",
                f"the same command asks them again; {trouble.hint}",
            )

    def save(self) -> None:
        """Rewrites the card with the work done so far."""
        if self._peak_memory is not None:
            self.session["peak_memory"] = self._peak_memory()
        self.sum_up()
        self.write_card()
        self._saved = time.monotonic()

    def save_in_time(self) -> None:
        """Rewrites the card when it is older than ``CARD_SECONDS``."""
        if time.monotonic() - self._saved > CARD_SECONDS:
            self.save()


def facts_of(model: Known, settings: Settings) -> dict[str, Any]:
    """Returns what decides answers and is known only when a model is loaded, as a card has it.

    Args:
        model: Identity of the model.
        settings: Settings that it was loaded with.
    """
    return {
        "weights": weights_digest(settings.model, model.commit),
        "files": model_files(settings.model, model.commit),
        "checkpoint": model.reading,
        "commit": model.commit,
        "dtype": model.dtype,
    }


def asked_before(answered: Iterable[tuple[Found | None, str]]) -> Question | None:
    """Finds the first answered question whose picture can still be opened; None without one.

    Args:
        answered: For each answer, the picture, or None for a prompt alone, and the prompt.
    """
    for file, prompt in answered:
        try:
            return Question(None if file is None else open_found(file).image, prompt)
        except (DataError, PassingError):  # broken since, or not available now
            continue
    return None


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
