"""Parts pictures into those that are answered together and suspects, on which a process may have died, each alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from vlmfix.answering import Answerer
from vlmfix.crew import Crew
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
    is_suspect: Callable[[Item], bool],
    begin: Callable[[Sequence[Item]], None],
) -> Iterator[tuple[bool, Iterator[Item]]]:
    """Parts pictures into stretches, in order: each suspect by itself, and what is between suspects together.

    Args:
        chunks: The pictures, as many at a time as are begun together; one chunk is used up before the next is taken.
        is_suspect: Says whether a picture is a suspect.
        begin: Called with pictures before they are yielded, but for suspects.

    Yields:
        Whether the stretch is a suspect, and its pictures; they are to be settled before the next stretch is asked for.
    """
    coming, chunk = iter(chunks), list[Item]()

    def more() -> bool:
        if not chunk:
            chunk.extend(next(coming, ()))
        return bool(chunk)

    def together() -> Iterator[Item]:
        while more() and not is_suspect(chunk[0]):
            begun = list(itertools.takewhile(lambda file: not is_suspect(file), chunk))
            begin(begun)
            for file in begun:
                del chunk[0]
                yield file

    while more():
        if is_suspect(chunk[0]):
            yield True, iter([chunk.pop(0)])
        else:
            yield False, together()


def prove(answerer: Answerer | Crew, asked_before: Callable[[], Question | None]) -> None:
    """Asks a question that was answered before, so that no picture is given up for a machine that answers nothing.

    On such a machine the process dies of that, before it has begun the picture on which another one died alone.

    Args:
        answerer: What is to answer the picture.
        asked_before: Returns a question that has been answered; None without one.
    """
    if (question := asked_before()) is not None:
        answerer.outcome(question)
