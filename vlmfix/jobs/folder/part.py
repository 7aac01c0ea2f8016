"""Writes what one worker answers of one block of a shared run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vlmfix.errors import DataError
from vlmfix.files import make_folder
from vlmfix.jobs.blocks import LINE, LINES, BlockFolder, Lease
from vlmfix.jobs.folder.job import SPREAD
from vlmfix.jobs.journal import BEGUN, Journal
from vlmfix.records import JsonLines


class Part:
    """Writes one attempt at a block."""

    def __init__(self, folder: BlockFolder, lease: Lease, worker: str) -> None:
        self._folder, self._lease, self._worker = folder, lease, worker
        make_folder(folder.part(lease))
        self._lines = JsonLines(folder.part(lease) / LINES, LINE)
        self.journal = Journal(folder.part(lease) / BEGUN, folder.begun(lease))
        self._open = True
        self.left = self.left_open = 0
        self.answers = 0
        self.answered: dict[str, str] = {}
        """The first pictures that were answered, each with a prompt."""
        self.reasons: Counter[str] = Counter()
        self.known: set[tuple[str, ...]] = set()
        """(image, prompt) of answers and failures, and (image,) of pictures that cannot be opened."""

    def write(self, line: dict[str, Any]) -> None:
        """Writes an answer or a failure, unless it stands there; what belongs to a block that is done is let go.

        Raises:
            DataError: It cannot be written.
        """
        key = (line["image"], line["prompt"]) if "prompt" in line else (line["image"],)
        if key in self.known:
            return
        with self._unless_done():
            self._lines.append(line)
        self.known.add(key)
        if "reason" in line:
            self.reasons[line["reason"]] += 1
        else:
            self.answers += 1
            if len(self.answered) < SPREAD:
                self.answered[line["image"]] = line["prompt"]

    def begin(self, names: Sequence[str], *, apart: bool = False) -> None:
        """Notes in the journal which pictures are about to be answered; see ``Journal.begin``."""
        with self._unless_done():
            self.journal.begin(names, apart=apart)

    @contextmanager
    def _unless_done(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            if not self._folder.is_done(self._lease.number):  # else another attempt was first, and has removed this one
                raise

    def finish(self) -> bool:
        """Makes the part that of its block; returns False where another attempt was first."""
        self.close()
        counts = {"answers": self.answers, "failed": self.reasons.total(), "reasons": dict(self.reasons)}
        return self._folder.finish(self._lease, {**counts, "worker": self._worker})

    def close(self, *, died: bool = False) -> None:
        """Closes the files; a start that takes the block over goes on with what is there.

        Args:
            died: Says that a process that answered for this worker has died.
        """
        if self._open:
            self._open = False
            try:
                with self._unless_done():
                    self.journal.close(died=died)
            finally:
                self._lines.close()
