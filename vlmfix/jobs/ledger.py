"""The ledger of a job says whose the folder is and which starts have written it, so that the next one can go on."""

from __future__ import annotations

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
from vlmfix.images import open_picture
from vlmfix.records import JsonLines, read_json, refuse_other, replace_json
from vlmfix.settings import Settings
from vlmfix.shapes import Shape
from vlmfix.supply import Question

CARD_SECONDS = 30.0
"""The card is at most this old while a model answers."""


class CardFolder(ABC):
    """A folder whose card says whose its lines are, and that one process at a time may write.

    ``with`` opens it: the files' locks are taken first, and nothing is changed before the card has shown that the
    folder is this job's or nobody's.

    Args:
        folder: Made when it is missing.
        files: What each line of the folder's files must hold, by the files' paths below the folder.

    Class attributes:
        card_name: Name of the card.
        card_shape: What the card must hold for the folder to be gone on with.
        holds: What the lines are, for messages.
        option: The option of the command line that names the folder, for hints.

    Raises:
        UsageError: Another process writes there, or the folder holds what was made with other settings.
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
            if self._path.exists():
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
            if parent.is_symlink():
                raise DataError(
                    f"{parent} is a link, and nothing is written through links", f"choose another {self.option}"
                )
            make_folder(parent)
        return JsonLines(self.folder / name, self._shapes[name])

    @abstractmethod
    def new_card(self) -> dict[str, Any]:
        """Gives the card of a folder that is nobody's yet, to be written later.

        Raises:
            UsageError: It holds files that only a card could explain.
        """

    @abstractmethod
    def go_on(self) -> None:
        """Compares the card with what this job is.

        Raises:
            UsageError: It is another job's.
        """

    @abstractmethod
    def read_back(self) -> None:
        """Reads what earlier starts have written."""

    def tidy(self) -> None:
        """Removes the drafts that a kill has left."""
        remove_drafts(self.folder, self.card_name)

    def refuse_unknown(self, files: Iterable[str]) -> None:
        """Refuses files that hold something, though no card says what.

        Args:
            files: Their paths below the folder.

        Raises:
            UsageError: One is not empty.
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
    """The folder of a job with a model: answers and failures, and a card that lists every start as a session.

    A start that leaves questions to a later one, since trouble of the machine kept them from being answered, notes them
    in ``left_open``.

    Args:
        folder: Made when it is missing.
        files: What each line of the folder's files must hold, by the files' paths below the folder.
        retry_failed: Asks again what failed; its lines leave the files when a model begins to work.

    Class attributes:
        failure: Field that the line of a failure has, and no line of an answer.
        unit: What is left open, for messages.
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
        """What is left open, in words, each with the trouble."""

    @abstractmethod
    def sum_up(self) -> None:
        """Brings what the card says of the answers up to date."""

    @property
    def session(self) -> dict[str, Any]:
        """What the card says of this start, or of the last."""
        session: dict[str, Any] = self.card["sessions"][-1]
        return session

    def standing(self, name: str, lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Passes on the lines of a file but for failures that are to be asked again.

        Args:
            name: The file's path below the folder.
            lines: What it holds.
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
            model: What the model is.
            settings: What it was loaded with.
            noted: The part of the card that says what decides the answers; what is found is compared with it, and added
                to it in the first session alone: what that did not note cannot be known of its answers.
            found: What decides the answers, beside the model's files, and is known only now.
            session: What may differ from start to start.
            peak_memory: Gives the most bytes that were held so far.

        Raises:
            UsageError: The folder's answers were made with other weights or files of the model, in another precision or
                with other things found, or by a version that did not note them.
        """
        begun = bool(self.card["sessions"])
        if begun:
            refuse_older_card(self.folder, noted)
        found = {
            "weights": weights_digest(settings.model, model.commit),
            "files": model_files(settings.model, model.commit),
            "checkpoint": model.reading,
            "commit": model.commit,
            "dtype": model.dtype,
            **found,
        }
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
            PassingError: Trouble of the machine has left something open.
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
        """Rewrites the card with what has been done so far."""
        if self._peak_memory is not None:
            self.session["peak_memory"] = self._peak_memory()
        self.sum_up()
        self.write_card()
        self._saved = time.monotonic()

    def save_in_time(self) -> None:
        """Rewrites the card when it is old."""
        if time.monotonic() - self._saved > CARD_SECONDS:
            self.save()


def asked_before(answered: Iterable[tuple[Path | None, str]]) -> Question | None:
    """Makes the first question of those answered whose picture can still be opened.

    Args:
        answered: File of the picture, or None for a prompt alone, and the prompt.
    """
    for path, prompt in answered:
        try:
            return Question(None if path is None else open_picture(path).image, prompt)
        except (DataError, PassingError):  # broken since it was answered, or not to be had now
            continue
    return None


def now() -> str:
    """Says the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
