"""Question files as benchmarks publish them: which bytes they are, and the objects in them with their lines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

SPACE = re.compile(r"\s*")


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
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: {name} is {value!r}, not a text", "check the file")
        return value


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
            self._parse(json.loads)
            start = _skip(self.text, start + 1)
        decoder = json.JSONDecoder()
        line, counted = 1, 0
        while start < len(self.text) and not (array and self.text[start] == "]"):
            line, counted = line + self.text.count("\n", counted, start), start
            where = f"{self.path}, line {line}"
            fields, end = self._parse(decoder.raw_decode, start)
            if not isinstance(fields, dict):
                raise DataError(f"{where}: {str(fields)[:40]!r} is not a JSON object", "check the file")
            yield Entry(where, fields)
            start = _skip(self.text, end)
            if array and self.text[start] == ",":
                start = _skip(self.text, start + 1)

    def _parse(self, parse: Any, *start: int) -> Any:  # noqa: ANN401 (what JSON can hold has no name)
        try:
            return parse(self.text, *start)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.path}, line {error.lineno} is not JSON: {error.msg}",
                "give JSON lines or a JSON array, as published",
            ) from error
        except RecursionError as error:
            raise DataError(f"{self.path} nests too deeply to be a question file", "check the file") from error


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
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}", "give the file as published") from error
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    return Source(path, text, md5, hashlib.sha256(raw).hexdigest())


def files_of(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder that end in one of the suffixes, sorted; hidden ones are left out.

    Raises:
        DataError: There is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no {path}", "check the path")
    found = sorted(file for file in path.iterdir() if file.suffix in suffixes and not file.name.startswith("."))
    if not found:
        raise DataError(f"no file in {path} ends in {' or '.join(suffixes)}", "give the folder of the question files")
    return found


def _skip(text: str, start: int) -> int:
    """Where the white space ends."""
    found = SPACE.match(text, start)
    return found.end() if found else start
