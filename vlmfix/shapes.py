"""What fields of a file may hold, declared once: whoever reads the file can then rely on their types."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

LARGEST = 1 << 53
"""No count is above: from here on floats are not exact any more."""
LONGEST = 1e15
"""No number of a result is above, in either direction."""
SHOWN = 40
"""Characters of a wrong value in a message."""


@dataclass(frozen=True)
class Shape:
    """What a value may be.

    Attributes:
        problem: What is wrong with a value, as the place of the fault in it and a sentence; None when nothing is.
    """

    problem: Callable[[Any], tuple[str, str] | None] = field(repr=False)

    def or_null(self) -> Shape:
        """The same, or null."""
        return Shape(lambda value: None if value is None else self.problem(value))


def simple(words: str, fits: Callable[[Any], bool]) -> Shape:
    """Makes the shape of a value that is looked at whole.

    Args:
        words: What it must be, behind "is ..., not".
        fits: Says whether a value is that.
    """

    def problem(value: Any) -> tuple[str, str] | None:  # noqa: ANN401 (any JSON value)
        return None if fits(value) else ("", f"is {_shown(value)}, not {words}")

    return Shape(problem)


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number beyond all counts"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _is_path(value: object) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair that stands for no byte
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LONGEST <= value <= LONGEST


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value) is not None
    except ValueError:
        return False


TEXT = simple("a text", lambda value: isinstance(value, str))
PATH = simple("a path", _is_path)
TIME = simple("a time", _is_time)
FLAG = simple("true or false", lambda value: isinstance(value, bool))
NUMBER = simple("a number", _is_number)
DURATION = simple("a number from 0", lambda value: _is_number(value) and value >= 0)
COUNT = simple("a whole number from 0", lambda value: type(value) is int and 0 <= value <= LARGEST)
SIZE = simple("a whole number from 1", lambda value: type(value) is int and 1 <= value <= LARGEST)
SEED = simple("a whole number from 0 below 2**63", lambda value: type(value) is int and 0 <= value < 1 << 63)
OBJECT = simple("an object", lambda value: isinstance(value, dict))


def list_of(shape: Shape, *, least: int = 0) -> Shape:
    """A list of at least so many values of one shape."""

    def problem(value: Any) -> tuple[str, str] | None:  # noqa: ANN401
        if not isinstance(value, list) or len(value) < least:
            return "", f"is {_shown(value)}, not a list{f' of {least} or more' if least else ''}"
        found = ((number, shape.problem(entry)) for number, entry in enumerate(value, start=1))
        return next(((f"[{number}]{wrong[0]}", wrong[1]) for number, wrong in found if wrong), None)

    return Shape(problem)


def mapping_of(shape: Shape) -> Shape:
    """An object of any fields, whose values have one shape."""

    def problem(value: Any) -> tuple[str, str] | None:  # noqa: ANN401
        wrong = OBJECT.problem(value)
        return wrong or fields(dict.fromkeys(value, shape)).problem(value)

    return Shape(problem)


def fields(needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    """An object that has some fields and may have others; those that are not named may hold anything."""

    def problem(value: Any) -> tuple[str, str] | None:  # noqa: ANN401
        if wrong := OBJECT.problem(value):
            return wrong
        if missing := [name for name in needed if name not in value]:
            return "", f"has no {', '.join(missing)}"
        for name, shape in {**(optional or {}), **needed}.items():
            if name in value and (found := shape.problem(value[name])):
                return f".{name}{found[0]}", found[1]
        return None

    return Shape(problem)


def fault(value: Any, shape: Shape) -> str | None:  # noqa: ANN401
    """What is wrong with a value, in words that go on from a file's name: "has no prompt", ": seed is 'x', not ..."."""
    found = shape.problem(value)
    if found is None:
        return None
    place, sentence = found
    return f": {place.removeprefix('.')} {sentence}" if place else f" {sentence}"
