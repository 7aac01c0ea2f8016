"""Plans a run that workers share: one of them at a time divides the source into blocks, beside its other work."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import Self

from vlmfix.errors import DataError
from vlmfix.images import Found
from vlmfix.jobs import blocks as shared
from vlmfix.jobs.blocks import BlockFolder, Watch, noted, size_of
from vlmfix.jobs.folder.pulse import Worker
from vlmfix.jobs.folder.questions import Questions
from vlmfix.seen import Seen
from vlmfix.sources import Source


class Planner:
    """Plans the run in a thread of its own when it has to be and no other worker does."""

    def __init__(self, folder: BlockFolder, worker: Worker, source: Source, questions: Questions) -> None:
        self._folder, self._worker, self._source, self._questions = folder, worker, source, questions
        self.base = source.place if os.path.isdir(source.place) else source.place.parent
        self._watch = Watch(folder)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._ending = threading.Event()
        self._checked = 0.0
        self._again = self._is_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _is_over(self) -> bool:
        """Says whether all that was planned is done, so that only pictures that were added are left."""
        numbers, end = self._folder.planned()
        done = self._folder.finished()
        return end is not None and all(number in done or self._folder.is_end(number) for number in numbers)

    def check(self) -> bool:
        """Begins to plan if that is needed, and says whether this worker or another one plans.

        Raises:
            VlmfixError: Planning failed here.
        """
        self._checked = time.monotonic()
        if self._error is not None:
            raise self._error
        if self._thread is not None and self._thread.is_alive():
            return True
        if self._folder.planned()[1] is not None and not self._again:
            return False
        last = self._folder.planning()
        self._watch.look()
        if last is not None and not self._is_free(_plan(last)):
            self._again = False  # the other one plans for all
            return True
        self._again = False
        if self._worker.is_planning:  # it has come to its end since
            self._worker.plans(False)
        self._worker.plans(True)
        if self._folder.take(_plan(0 if last is None else last + 1), self._worker.name):
            self._thread = threading.Thread(target=self._plan, name="vlmfix-plan", daemon=True)
            self._thread.start()
        else:
            self._worker.plans(False)
        return True

    def check_in_time(self) -> None:
        """Does the same from time to time, and raises what has failed here at once."""
        if self._error is not None:
            raise self._error
        if time.monotonic() - self._checked > shared.LEASE_SECONDS / shared.BEATS:
            self.check()

    def _is_free(self, lease: str) -> bool:
        card = self._folder.card(self._folder.owner(lease))
        return (card is not None and not card["planning"]) or self._watch.is_free(lease)

    def _plan(self) -> None:
        try:
            self._write()
        except Exception as error:  # raised again where the worker looks for it
            self._error = error
        with suppress(DataError):
            self._worker.plans(False)

    def _write(self) -> None:
        """Adds to the plan what it lacks of the source, and an end."""
        if self._questions.named:
            self._questions.check(self._source)
        self._known, self._number, self._before = Seen(), 0, 0
        while self._read():
            pass
        pending: list[tuple[Found, tuple[str, ...]]] = []
        count = 0
        for file in self._source:
            if self._ending.is_set():
                return
            self._worker.planned()
            asked = self._questions.of_picture(file)
            prompts = tuple(prompt for prompt in asked if self._known.add((file.name, prompt)))
            if prompts:
                pending.append((file, prompts))
                count += len(prompts)
            if count >= size_of(self._number):
                self._publish(pending)
                pending, count = [], 0
        self._publish(pending)
        if self._before == 0:
            raise DataError(f"no file in {self._source.place}", "give a picture, or a folder with pictures")
        while self._number == 0 or not self._folder.is_end(self._number - 1):
            self._folder.publish(self._number, [], self._before, 0)
            self._read()

    def _publish(self, pending: list[tuple[Found, tuple[str, ...]]]) -> None:
        while pending:
            count = sum(len(prompts) for _, prompts in pending)
            lines = [noted(file, prompts if self._questions.tabled else (), self.base) for file, prompts in pending]
            if self._folder.publish(self._number, lines, self._before, count):
                self._number, self._before = self._number + 1, self._before + count
                return
            theirs = self._read()  # another one planned while this one was thought to be dead, or the other way round
            left = (
                (file, tuple(prompt for prompt in prompts if (file.name, prompt) not in theirs))
                for file, prompts in pending
            )
            pending = [(file, prompts) for file, prompts in left if prompts]

    def _read(self) -> set[tuple[str, str]]:
        """Reads the next block of the plan, and returns its questions and one more; nothing where there is none."""
        if not os.path.exists(self._folder.plan / f"{self._number:08d}"):
            return set()
        theirs = {("", "")}
        self._worker.planned()
        for file in self._folder.pictures(self._number, self.base):
            for prompt in self._questions.of_picture(file):
                theirs.add((file.name, prompt))
                self._known.add((file.name, prompt))
        self._before += self._folder.head(self._number)[1]
        self._number += 1
        return theirs


def _plan(attempt: int) -> str:
    return f"plan-{attempt:04d}"
