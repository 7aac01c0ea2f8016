"""Notes which pictures a process is about to answer, so that one that follows knows on which ones it may have died.

A fault in a library, or the system's want of memory, may end a process on one picture, and every process after it on
the same one. A process that died may as well have been killed for its machine's sake. So pictures that a dead process
had in hand are *suspects*, which the next process answers apart: in batches with nothing else in hand, and those of a
batch in which it died as well each alone. One with which processes died ``DEATHS`` times apart is given up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.files import cannot_write, remove_drafts
from vlmfix.records import JsonLines, read_lines
from vlmfix.shapes import TEXT, Shape, fields, list_of

BEGUN = "begun.jsonl"
"""Name of a journal."""
DEATHS = 3
"""Processes that died while they answered a picture apart, in a batch once and then alone, after which nobody tries."""
DIED = "the process died or hung twice while this picture was answered"
"""Reason of a picture that was given up."""
LONGEST = 1000
"""Pictures that a journal names before those that are settled leave it."""
KINDS = ("begun", "apart", "over")
"""What a line tells of pictures: they were begun with others, or apart, or came back and no other file says how."""
LINE = Shape(lambda value: _one_of(value).problem(value))
"""Shape of a line."""


class Journal:
    """Keeps the journal of one process, and knows those of processes that had the same pictures before.

    Whoever has it says which pictures are settled by answers and failures of its own; lines about these mean nothing.

    Args:
        path: The file; made when the first picture is begun. One that is there is of a process that died.
        earlier: Lines of other journals.

    Raises:
        DataError: The file is not a journal.
    """

    def __init__(self, path: Path, earlier: Iterable[dict[str, Any]] = ()) -> None:
        self.path = path
        self._lines: JsonLines | None = None
        self._named = 0
        self._in_hand: dict[str, bool] = {}
        """Pictures that this process has begun and that are not settled, and whether apart."""
        self._before = _deaths(read_lines(path, LINE))
        """Suspects of earlier processes that the file tells of, each with how many died with it apart."""
        self._deaths = _deaths(earlier)
        self._deaths.update(self._before)

    def deaths(self, name: str) -> int | None:
        """Returns how many processes died while they answered a suspect apart; None for what is no suspect."""
        return self._deaths[name] if name in self._deaths else None

    def is_doubtful(self, name: str) -> bool:
        """Says whether a process died while it answered a picture alone, so that this is the last to be tried."""
        return self._deaths[name] > 1

    def is_given_up(self, name: str) -> bool:
        """Says whether a picture is not to be answered any more."""
        return self._deaths[name] >= DEATHS

    def begin(self, names: Sequence[str], *, apart: bool = False) -> None:
        """Notes pictures that are about to be opened and answered.

        Args:
            names: The pictures.
            apart: Says that this process has nothing else in hand until they are settled.

        Raises:
            DataError: The file cannot be written.
        """
        if not names:
            return
        if self._lines is None:
            self._lines = JsonLines(self.path, LINE)
        self._named += len(names)
        if self._named > LONGEST:
            self._lines.replace(_lines(self._before, [name for name in self._in_hand if name not in self._before]))
            self._named = len(self._before) + len(self._in_hand)
        self._lines.append({"apart" if apart else "begun": list(names)})
        self._in_hand.update(dict.fromkeys(names, apart))

    def settle(self, name: str) -> None:
        """Says that a picture has all its answers or failures."""
        self._in_hand.pop(name, None)
        self._before.pop(name, None)

    def keep(self, names: Set[str]) -> None:
        """Forgets all suspects but some: the others were settled before, or are no pictures of the run any more."""
        for known in (self._before, self._deaths):
            for name in [name for name in known if name not in names]:
                del known[name]

    def forgive(self, name: str) -> None:
        """Lets a picture be answered beside others, whatever was noted of it."""
        self._deaths.pop(name, None)

    def leave(self, names: Iterable[str]) -> None:
        """Notes that pictures came back, and that the process lives, where no answer or failure says so at once.

        Raises:
            DataError: The file cannot be written.
        """
        over = [name for name in names if self._in_hand.pop(name, None) is not None]
        if over and self._lines is not None:
            self._lines.append({"over": over})

    def close(self, *, died: bool = False) -> None:
        """Forgets what this process had in hand, since it ends alive; what it knows of earlier ones stays.

        Args:
            died: Says that a process that answered for this one has died, so that nothing is forgotten.

        Raises:
            DataError: The file cannot be changed.
        """
        if self._lines is None:
            return
        lines, self._lines = self._lines, None
        try:
            if not died and self._before:
                try:
                    lines.replace(_lines(self._before))
                except DataError:  # the disk is full; to know less costs no more than further deaths
                    self._before.clear()
        finally:
            lines.close()
        if not died and not self._before:
            self.remove()

    def remove(self) -> None:
        """Removes the file: nothing is open any more.

        Raises:
            DataError: It cannot be removed.
        """
        try:
            self.path.unlink(missing_ok=True)
            remove_drafts(self.path.parent, self.path.name)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of another process's journal, as far as they can be read: it may be at it, or have died."""
    with suppress(DataError):
        yield from read_lines(path, LINE)


def _deaths(lines: Iterable[dict[str, Any]]) -> Counter[str]:
    found = Counter[str]()
    for line in lines:
        for name in line.get("over", ()):
            found.pop(name, None)
        found.update(dict.fromkeys(line.get("begun", ()), 0))
        found.update(line.get("apart", ()))
    return found


def _lines(deaths: Counter[str], begun: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yields lines that tell of suspects, of how many died with each apart, and of further pictures in hand."""
    yield {"begun": [*deaths, *begun]}
    yield from ({"apart": [name]} for name in deaths.elements())


def _one_of(value: Any) -> Shape:  # noqa: ANN401 (any JSON value)
    known = [kind for kind in KINDS if isinstance(value, dict) and kind in value]
    return fields({(known or KINDS)[0]: list_of(TEXT)})
