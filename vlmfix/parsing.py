"""Text, JSON and TOML that somebody else wrote: what is wrong with it is one plain sentence, whatever it is."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Sequence
from typing import Any

LONGEST = 80
"""Characters of a value in a message."""
SHOWN = 5
"""Names in a message; the rest are counted."""
DIGITS = 300
"""Longest number that is read; Python would take seconds for a million digits, and refuses them by default."""

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What steers a terminal, ends a line or turns the direction of writing, and halves of characters."""
WORD = re.compile("\\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}-]\\w+)*|[^\\w\\s]")
"""A word with what joins its parts, or a punctuation mark."""
NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


class UnreadableError(ValueError):
    """What was read is not what it should be.

    Args:
        problem: What is wrong, as the end of a sentence about the file: "is not JSON: ...".
        line: Where, counted from 1; None when it is not known.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


def text_of(raw: bytes) -> str:
    """Decode a text file: UTF-8 with or without a byte order mark, lines ended in any of the three ways.

    Returns:
        The text, with a line feed at the end of each line.

    Raises:
        UnreadableError: The bytes are no such text.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 text: {error.reason}", raw.count(b"\n", 0, error.start) + 1) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UnreadableError("is not UTF-8 text: it holds a zero byte, as UTF-16 does", line)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_at(text: str, start: int = 0) -> tuple[Any, int]:
    """Read one JSON value, by the letter of the standard.

    Python's own reader also takes NaN and infinite numbers, which nothing can be counted with and no JSON file may
    hold, the last of several values of one name, and halves of surrogate pairs, which are no text.

    Args:
        text: What holds the value.
        start: Where it begins.

    Returns:
        The value, and where it ends.

    Raises:
        UnreadableError: There is no such value.
    """
    try:
        return _JSON.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is not JSON: {error.msg}", error.lineno) from error
    except ValueError as error:
        raise UnreadableError(f"is not JSON: {error}", text.count("\n", 0, start) + 1) from error
    except RecursionError as error:
        raise UnreadableError("nests too deeply", text.count("\n", 0, start) + 1) from error


def toml_of(raw: bytes) -> dict[str, Any]:
    """Read a TOML document.

    Raises:
        UnreadableError: The bytes are none.
    """
    try:
        return tomllib.loads(text_of(raw))
    except UnreadableError as error:
        raise UnreadableError(f"is not TOML: line {error.line} {error.problem}") from error
    except ValueError as error:
        raise UnreadableError(f"is not TOML: {_brief(str(error))}") from error
    except RecursionError as error:
        raise UnreadableError("is not TOML: it nests too deeply") from error


def is_text(value: object) -> bool:
    """Whether a value is text that can be written: a string without halves of surrogate pairs."""
    return isinstance(value, str) and _encodes(value)


def told(value: object) -> str:
    """A value from a file in a message: on one line, cut where it is long, and what nests only by its kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return _brief(repr(value))


def escaped(text: str, *, lines: bool = False) -> str:
    """A text from elsewhere with its control characters in the notation of JSON, so that no terminal obeys them.

    Args:
        text: A name, an answer, a message.
        lines: Leaves line breaks and tabs as they are.
    """
    kept = "\n\t" if lines else ""
    return CONTROLS.sub(lambda found: found[0] if found[0] in kept else _notation(found[0]), text)


def _notation(sign: str) -> str:
    return NAMED.get(sign, f"\\u{ord(sign):04x}")


def some(values: Sequence[object], *, shown: int = SHOWN) -> str:
    """The first few of many names in a message, and how many more there are."""
    text = ", ".join(_name(value) for value in values[:shown])
    return f"{text} and {len(values) - shown} more" if len(values) > shown else text


def _name(value: object) -> str:
    """A name as it is, or quoted and cut where it would spoil the line."""
    text = str(value)
    return text if text.isprintable() and len(text) <= LONGEST else told(text)


def _brief(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{told(twice)} stands twice in one object")
    return found


def _int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{_brief(digits)} is not a number that can be counted with")
    return number


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_float)
