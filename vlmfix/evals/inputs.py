"""Question files as benchmarks publish them: which bytes they are, and the objects in them with their lines."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.parsing import UnreadableError, is_text, json_at, text_of, told

SPACE = re.compile(r"\s*")
SHAPE = "give JSON lines or a JSON array, as published"


@dataclass(frozen=True)
class Entry:
    """One object of a question file.

    Attributes:
        where: File and line, for messages.
        fields: The object.
    """

    where: str
    fields: dict[str, Any]

    def require(self, *names: str) -> None:
        """Make sure that the fields are there.

        Raises:
            DataError: Some are not; the message says which.
        """
        missing = [name for name in names if name not in self.fields]
        if missing:
            raise DataError(f"{self.where} has no {', '.join(missing)}", f"each object needs {', '.join(names)}")

    def text(self, name: str) -> str:
        """A field that must hold text.

        Raises:
            DataError: It holds something else, or nothing.
        """
        value = self.fields[name]
        if not isinstance(value, str) or not value.strip() or not is_text(value):
            raise DataError(f"{self.where}: {name} is {told(value)}, not a text", "check the file")
        return value

    def identity(self, name: str) -> str:
        """A field that tells this object from others: a whole number or text, as text.

        Raises:
            DataError: It holds something else.
        """
        value = self.fields[name]
        return str(value) if type(value) is int else self.text(name)


@dataclass(frozen=True)
class Source:
    """A question file.

    Attributes:
        path: Where it is.
        text: What it holds.
        md5: Hex digest of its bytes; the one that published files are known by.
        sha256: Hex digest of its bytes.
    """

    path: Path
    text: str
    md5: str
    sha256: str

    def about(self) -> dict[str, Any]:
        """Which file this is, in JSON values."""
        return {"file": self.path.name, "md5": self.md5, "sha256": self.sha256}

    def entries(self) -> Iterator[Entry]:
        """The objects of the file: JSON lines, or one JSON array, pretty-printed or not.

        Raises:
            DataError: The file holds something else.
        """
        start = _skip(self.text, 0)
        if array := self.text.startswith("[", start):
            start = _skip(self.text, start + 1)
            if self.text.startswith("]", start):
                return
        line, counted = 1, 0
        while array or start < len(self.text):
            fields, end = self._parse(start)
            line, counted = line + self.text.count("\n", counted, start), start
            where = f"{self.path}, line {line}"
            if not isinstance(fields, dict):
                raise DataError(f"{where}: {told(fields)} is not a JSON object", "check the file")
            yield Entry(where, fields)
            start = _skip(self.text, end)
            if array:
                if not self.text.startswith(",", start):
                    break
                start = _skip(self.text, start + 1)
        if array and self.text[start:].rstrip() != "]":
            line = 1 + self.text.count("\n", 0, start)
            raise DataError(f"{self.path}, line {line} is not JSON: the array has to go on or to end there", SHAPE)

    def lines(self) -> list[str]:
        """The lines of the file, without their ends; what only some programs take for the end of a line is none."""
        return self.text.split("\n")

    def _parse(self, start: int) -> tuple[Any, int]:
        try:
            return json_at(self.text, start)
        except UnreadableError as error:
            raise DataError(f"{self.path}, line {error.line} {error.problem}", SHAPE) from error


def read_source(path: Path) -> Source:
    """Read a question file.

    Raises:
        DataError: It cannot be read, or is not UTF-8 text.
    """
    try:
        return source(path, path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from error


def source(path: Path, raw: bytes) -> Source:
    """Bytes as a question file.

    Raises:
        DataError: They are not UTF-8 text.
    """
    try:
        text = text_of(raw)
    except UnreadableError as error:
        raise DataError(f"{path}, line {error.line} {error.problem}", "give the file as published") from error
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    return Source(path, text, md5, hashlib.sha256(raw).hexdigest())


def files_of(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder that end in one of the suffixes, sorted; hidden ones are left out.

    Raises:
        DataError: There is none.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise DataError(f"there is no {path}", "check the path")
    found = sorted(file for file in path.iterdir() if file.suffix in suffixes and not file.name.startswith("."))
    if not found:
        raise DataError(f"no file in {path} ends in {' or '.join(suffixes)}", "give the folder of the question files")
    return found


def _skip(text: str, start: int) -> int:
    """Where the white space ends."""
    found = SPACE.match(text, start)
    return found.end() if found else start
