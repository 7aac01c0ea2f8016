"""Result files that survive a kill: JSON lines appended whole, JSON documents replaced whole."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from vlmfix.errors import DataError, UsageError

SHOWN = 80
"""Longest value in a message, in characters."""
SYNC_SECONDS = 5.0
"""At most this much is lost in a power cut; a killed process loses nothing that was appended."""


class JsonLines:
    """A file of JSON objects, one per line, that grows at its end and that one process at a time may hold.

    Opening it takes the file's lock and cuts off a last line that a kill left unfinished. Each line goes
    out in one write, so that a reader never sees half of one.

    Args:
        path: The file; made when it is missing. Its folder must exist.

    Raises:
        UsageError: Another process holds the file.
        DataError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DataError(f"cannot open {path}: {error.strerror}", "choose a folder that you may write to") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file).st_ino != os.stat(path).st_ino:
                raise FileNotFoundError  # its holder has replaced it since it was opened
        except OSError as error:
            os.close(self._file)
            raise UsageError(
                f"another process is writing to {path}", "wait for it to end, or choose another folder"
            ) from error
        self._synced = time.monotonic()
        os.ftruncate(self._file, _end_of_last_line(self._file))
        _draft(path).unlink(missing_ok=True)  # of a replacement that a kill has prevented

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects in the file, from its start.

        Raises:
            DataError: A line is not a JSON object.
        """
        return read_lines(self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line.

        Raises:
            DataError: The disk is full or gone; the file then ends with the last whole line.
        """
        line = to_json(record).encode() + b"\n"
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = os.write(self._file, line)
            problem = f"wrote {written} of {len(line)} bytes" if written < len(line) else ""
        except OSError as error:
            problem = str(error.strerror)
        if problem:
            os.ftruncate(self._file, end)
            raise DataError(f"cannot write to {self.path}: {problem}", "free some space and start again")
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Leaves lines out; a reader sees the old file or the new one, never a part, and the lock is never free.

        Args:
            wanted: Says of an object whether its line stays.

        Raises:
            DataError: A line is not a JSON object, or the new file cannot be written; the old one then stays.
        """
        draft = _draft(self.path)
        try:
            with draft.open("wb") as file:
                file.writelines(to_json(record).encode() + b"\n" for record in self if wanted(record))
                file.flush()
                os.fsync(file.fileno())
            replacement = os.open(draft, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            fcntl.flock(replacement, fcntl.LOCK_EX)
            draft.replace(self.path)
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror}", "free some space and start again") from error
        os.close(self._file)
        self._file = replacement

    def sync(self) -> None:
        """Waits until everything appended is on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs, and gives the lock back."""
        self.sync()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; an unfinished last line, as a kill leaves it, is passed over.

    Args:
        path: The file; one that does not exist has no lines.

    Raises:
        DataError: A finished line is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise _bad_line(path, number) from error
            if not isinstance(record, dict):
                raise _bad_line(path, number)
            yield record


def replace_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a JSON document so that a reader sees the old one or the new one, never a part.

    Raises:
        DataError: The file cannot be written.
    """
    draft = _draft(path)
    try:
        with draft.open("wb") as file:
            file.write(to_json(document, indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}", "free some space and start again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        DataError: The file is missing or does not hold a JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", "remove the file, or choose another folder") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no JSON object", "remove the file, or choose another folder")
    return document


def refuse_other(folder: Path, card: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Makes sure that a folder goes on with the settings that it was begun with.

    Args:
        folder: The folder, for the message.
        card: The file that says the settings, for the message.
        before: What it says.
        now: What is asked for; what else ``before`` holds is not compared.

    Raises:
        UsageError: Some differ; the message says which, with both values.
    """
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        first, second = (dict(flat({name: values.get(name) for name in differing})) for values in (before, now))
        listed = "; ".join(
            f"{name} was {shown(first.get(name))}, now {shown(second.get(name))}"
            for name in dict.fromkeys([*second, *first])
            if first.get(name) != second.get(name)
            and not any(longer.startswith(f"{name}.") for longer in (*first, *second))  # it was empty, and is not
        )
        raise UsageError(
            f"{folder} holds answers made with other settings: {listed}",
            f"choose another --out, or the settings in {card}",
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested mappings, by dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shown(value: object) -> str:
    """A value for a message, cut when it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def to_json(value: Any, *, indent: int | None = None) -> str:  # noqa: ANN401 (what JSON can hold has no name)
    """JSON text in plain characters, except that a file name which is not text is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a name from a file system that is not UTF-8 holds lone surrogates
        return json.dumps(value, ensure_ascii=True, indent=indent, allow_nan=False)
    return text


def _draft(path: Path) -> Path:
    """Where the new content of a file is written before it replaces the old."""
    return path.with_name(f".{path.name}.new")


def _bad_line(path: Path, number: int) -> DataError:
    return DataError(f"line {number} of {path} is not a JSON object", "remove that line, or choose another folder")


def _end_of_last_line(file: int, block: int = 1 << 16) -> int:
    """Offset just past the last newline, 0 when there is none; reads backwards."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
