"""Result files that survive a kill: JSON lines appended whole, JSON documents replaced whole."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from vlmfix.errors import DataError, UsageError
from vlmfix.files import cannot_write, remove_drafts, replacing
from vlmfix.shapes import OBJECT, Shape, fault

SHOWN = 80
"""Longest value in a message, in characters."""
LONGEST_LINE = 1 << 26
LARGEST_DOCUMENT = 1 << 28
"""Bytes; no line and no document of results comes near."""
DEEPEST = 64
"""Lists and objects within each other; no result nests as deeply."""
LINE_HINT = "restore the file, remove that line, or choose another folder"
DOCUMENT_HINT = "restore the file, or choose another folder"
LOCK_PAUSES = (0.01, 0.04)
"""Seconds after an attempt to lock a file: whoever asks ``is_held`` has it for some microseconds."""
SYNC_SECONDS = 5.0
"""At most this much is lost in a power cut; a killed process loses nothing that was appended."""


class JsonLines:
    """A file of JSON objects, one per line, that grows at its end and that one process at a time may hold.

    Opening it takes the file's lock and changes nothing in it: whose it is may show only when it has been read, or from
    what lies beside it. The first change claims it. Each line goes out in one write, so that a reader never sees half
    of one.

    Args:
        path: The file; made when it is missing. Its folder must exist.
        shape: What each object must hold.

    Raises:
        UsageError: Another process holds the file.
        DataError: The file cannot be opened, or is a link, a folder or a device.
    """

    def __init__(self, path: Path, shape: Shape = OBJECT) -> None:
        self.path = path
        self._shape = shape
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._file = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DataError(
                    f"{path} is a link, and nothing is written through links", "put the file itself there"
                ) from error
            raise DataError(f"cannot open {path}: {error.strerror}", "choose a folder that you may write to") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise DataError(f"cannot open {path}: it is not a file", "remove it, or choose another folder")
            self._lock()
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()
        self._claimed = False

    def _lock(self) -> None:
        from filelock import lock_descriptor  # a third of the time that --help takes

        try:
            for pause in (*LOCK_PAUSES, None):
                if lock_descriptor(self._file, blocking=False):
                    break
                if pause is None:
                    raise BlockingIOError
                time.sleep(pause)
            if os.fstat(self._file).st_ino != os.stat(self.path).st_ino:
                raise FileNotFoundError  # its holder has replaced it since it was opened
        except OSError as error:
            raise UsageError(
                f"another process is writing to {self.path}", "wait for it to end, or choose another folder"
            ) from error

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in the file."""
        return os.fstat(self._file).st_size == 0

    def claim(self) -> None:
        """Takes the file for one's own: a last line that a kill left unfinished is cut off.

        Raises:
            DataError: The file cannot be changed.
        """
        try:
            os.ftruncate(self._file, _end_of_last_line(self._file))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        remove_drafts(self.path.parent, self.path.name)  # of a replacement that a kill has prevented
        self._claimed = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects in the file, from its start.

        Raises:
            DataError: A line is not a JSON object, or lacks what it must hold.
        """
        return read_lines(self.path, self._shape)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line.

        Raises:
            DataError: The disk is full or gone; the file then ends with the last whole line.
        """
        line = to_json(record).encode() + b"\n"
        if not self._claimed:
            self.claim()
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"wrote {written} of {len(line)} bytes")
        except OSError as error:
            with suppress(OSError):  # what cannot be cut off now is cut off at the next start
                os.ftruncate(self._file, end)
            raise cannot_write(self.path, error) from error
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Leaves lines out; see ``replace``.

        Args:
            wanted: Says of an object whether its line stays.
        """
        self.replace(record for record in self if wanted(record))

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Puts other lines in place of all; a reader sees the old file or the new one, never a part.

        The lock is never free meanwhile.

        Args:
            records: The objects of the new lines.

        Raises:
            DataError: A line is not a JSON object, or the new file cannot be written; the old one then stays.
        """
        with replacing(self.path) as file:
            file.writelines(to_json(record).encode() + b"\n" for record in records)
            file.flush()
            replacement = os.dup(file.fileno())  # with the lock that the draft has from its beginning
            fcntl.fcntl(replacement, fcntl.F_SETFL, os.O_APPEND)
        os.close(self._file)
        self._file = replacement

    def sync(self) -> None:
        """Waits until everything appended is on the disk.

        Raises:
            DataError: The disk is full or gone.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs, and gives the lock back.

        Raises:
            DataError: The disk is full or gone.
        """
        try:
            self.sync()
        finally:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path, shape: Shape = OBJECT) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; an unfinished last line, as a kill leaves it, is passed over.

    Args:
        path: The file; one that does not exist has no lines.
        shape: What each object must hold.

    Raises:
        DataError: The file cannot be read, or a finished line is not a JSON object or lacks what it must hold.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    return
                yield _checked(line, shape, f"line {number} of {path}", LINE_HINT)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_read(path, error) from error


def count_lines(path: Path) -> int:
    """Counts the finished lines of a JSON-lines file, without a look at what they hold.

    Args:
        path: The file; one that does not exist has no lines.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with _opened(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _cannot_read(path, error) from error


def is_held(path: Path) -> bool:
    """Says whether a process writes to a JSON-lines file, as its lock tells.

    Args:
        path: The file; one that does not exist is held by nobody.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with _opened(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # filelock's keep others out, and need the right to write
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _cannot_read(path, error) from error
    return False


def replace_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a JSON document so that a reader sees the old one or the new one, never a part.

    Raises:
        DataError: The file cannot be written.
    """
    text = to_json(document, indent=2).encode() + b"\n"
    with replacing(path) as file:
        file.write(text)


def read_json(path: Path, shape: Shape = OBJECT) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        shape: What the object must hold.

    Raises:
        DataError: The file is missing, does not hold a JSON object, or the object lacks what it must hold.
    """
    try:
        with _opened(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_DOCUMENT:
                raise DataError(f"{path} is too large to be a JSON document of ours", DOCUMENT_HINT)
            text = file.read()
    except OSError as error:
        raise _cannot_read(path, error) from error
    return _checked(text, shape, str(path), DOCUMENT_HINT)


def _checked(text: bytes, shape: Shape, where: str, hint: str) -> dict[str, Any]:
    """The JSON object that a text is, when it holds what it must."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DataError(f"{where} is not a JSON object: {error}", hint) from error
    if not isinstance(found, dict):
        raise DataError(f"{where} is not a JSON object", hint)
    if wrong := fault(found, shape):
        raise DataError(f"{where}{wrong}", hint)
    return found


def parse_json(text: bytes | str) -> Any:  # noqa: ANN401 (what JSON can hold has no name)
    """Reads JSON as the standard has it, without NaN and infinities.

    Raises:
        ValueError: The text is something else, or nests more deeply than any result.
    """
    try:
        document = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    if _is_deep(document):
        raise ValueError("it nests too deeply")
    return document


def _opened(path: Path) -> BinaryIO:
    """Opens a file to read; one that would never end, or that waits for a writer, is refused."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise DataError(f"cannot read {path}: it is not a file", "check the path")
    return os.fdopen(file, "rb")


def _cannot_read(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or error}", "check the path")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON, or too large")
    return number


def _is_deep(document: object) -> bool:
    level = [document]
    for _ in range(DEEPEST):
        objects = (
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        )
        level = [inner for held in objects for inner in held if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def refuse_other(
    folder: Path,
    card: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    holds: str = "answers",
    option: str = "--out",
) -> None:
    """Makes sure that a folder goes on with the settings that it was begun with.

    Args:
        folder: The folder, for the message.
        card: The file that says the settings, for the message.
        before: What it says.
        now: What is asked for; what else ``before`` holds is not compared.
        holds: What is in the folder, for the message.
        option: The option that names the folder, for the hint.

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
            f"{folder} holds {holds} made with other settings: {listed}",
            f"choose another {option}, or the settings in {card}",
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
