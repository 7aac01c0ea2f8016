"""Parts pictures into those that are answered as ever and suspects, on which a process may have died."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from vlmfix.answering import Answerer
from vlmfix.crew import Crew
from vlmfix.errors import SystematicError
from vlmfix.supply import Question

Item = TypeVar("Item")


def chunks(files: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Yields pictures so many at a time, as they are begun together."""
    coming = iter(files)
    while chunk := list(itertools.islice(coming, count)):
        yield chunk


def stretches(
    chunks: Iterable[Sequence[Item]],
    *,
    most: int,
    deaths: Callable[[Item], int | None],
    begin: Callable[[Sequence[Item], bool], None],
) -> Iterator[Iterator[Item]]:
    """Parts pictures into stretches, in order, each of which is settled before the next one is begun.

    Between suspects there is one stretch. Suspects are stretches apart: a batch of them, or one alone with which a
    process has died apart.

    Args:
        chunks: The pictures, as many at a time as are begun together; one chunk is used up before the next is taken.
        most: Most suspects of a stretch.
        deaths: Returns how many processes died with a suspect apart; None for what is no suspect.
        begin: Called with pictures before they are yielded, and whether they are a stretch apart.
    """
    coming, chunk = iter(chunks), list[Item]()

    def more() -> bool:
        if not chunk:
            chunk.extend(next(coming, ()))
        return bool(chunk)

    def unsuspected() -> Iterator[Item]:
        while more() and deaths(chunk[0]) is None:
            begun = list(itertools.takewhile(lambda file: deaths(file) is None, chunk))
            begin(begun, False)
            for file in begun:
                del chunk[0]
                yield file

    while more():
        if deaths(chunk[0]) is None:
            yield unsuspected()
        else:
            apart = list(itertools.takewhile(lambda file: deaths(file) == 0, chunk[:most])) or chunk[:1]
            del chunk[: len(apart)]
            begin(apart, True)
            yield iter(apart)


def prove(answerer: Answerer | Crew, asked_before: Callable[[], Question | None]) -> None:
    """Asks a question that was answered before, so that no picture is given up for a machine that answers nothing.

    On such a machine the process dies of that, before it has begun the picture on which another one died alone.

    Args:
        answerer: What is to answer the picture.
        asked_before: Returns a question that has been answered; None without one.

    Raises:
        SystematicError: Nothing was ever answered.
    """
    if (question := asked_before()) is None:
        raise SystematicError(
            "the process died again and again, and no question was ever answered",
            "nothing is recorded of the pictures it died on; see what the system's log says, and try other pictures",
        )
    answerer.outcome(question)
