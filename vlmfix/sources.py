"""Lists the pictures of a run one after the other: of a folder, a list of paths, a CSV file, or tar files.

Every iteration reads the source anew, so the memory that it takes does not grow with the number of pictures: a folder
needs the names in one folder, a tar file its own members.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import stat
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vlmfix.errors import DataError, PassingError, UsageError, passing
from vlmfix.images import Found, find
from vlmfix.parsing import some
from vlmfix.web import is_web, path_of

TAR, CSV, LISTS = ".tar", ".csv", (".txt", ".list")
"""Endings that say what a source is; a file with another one is a picture."""
COLUMNS = ("image", "path")
"""Columns of a CSV file that hold paths, when none is named."""
PROMPT = "prompt"
"""Column of a CSV file that holds prompts."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
"""Endings of pictures in a tar file; what else is there belongs to them, as labels do."""


class Source(ABC):
    """Lists pictures, as often as it is iterated over.

    Args:
        place: The folder or file.

    Attributes:
        column: Column of the paths, of a CSV file; None of others.
        prompts: Digest of the file where it asks the questions, too; None where it does not.
        repeats: Whether one picture may come more than once.
    """

    column: str | None = None
    prompts: str | None = None
    repeats: bool = True

    def __init__(self, place: Path) -> None:
        self.place = place

    @abstractmethod
    def __iter__(self) -> Iterator[Found]:
        """Yields the pictures in order.

        Raises:
            UsageError: The file does not have the form of its kind.
            DataError: The folder cannot be listed.
            PassingError: It cannot be read now.
        """


def source_of(place: Path, *, column: str | None = None, skip: Path | None = None) -> Source:
    """Makes the source that a path stands for, by what is there and the name's ending.

    Args:
        place: A folder, a picture, a tar file, a list (``.txt``, ``.list``) or a CSV file.
        column: Column of the paths in a CSV file; None for ``image`` or ``path``.
        skip: A folder to leave out, of a folder.

    Raises:
        UsageError: ``column`` is given for something else than a CSV file, or there is no such column.
        PassingError: The file cannot be read now.
    """
    ending = place.suffix.lower() if os.path.isfile(place) else ""
    if ending == CSV:
        return _Table(place, column)
    if column is not None:
        raise UsageError(f"{place} is no CSV file and has no columns", "leave --column out")
    return _List(place) if ending in LISTS else _Folder(place, skip)


class _Folder(Source):
    """A folder, or one file: a picture or a tar file."""

    repeats = False

    def __init__(self, place: Path, skip: Path | None) -> None:
        super().__init__(place)
        self._skip = skip

    def __iter__(self) -> Iterator[Found]:
        for file in find(self.place, skip=self._skip):
            yield from _members(file)


class _List(Source):
    """A text file with a path on each line, relative to the file's folder or absolute, or a URL."""

    def __iter__(self) -> Iterator[Found]:
        folder = self.place.parent
        with _readable(self.place), self.place.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if b"\0" in line:
                    raise UsageError(
                        f"{self.place}, line {number} holds a zero byte", "give a text file with a path on each line"
                    )
                if name := os.fsdecode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
                    yield from _members(_named(name, folder))


class _Table(Source):
    """A CSV file with a column of paths, as in a list, and perhaps one of prompts."""

    def __init__(self, place: Path, column: str | None) -> None:
        super().__init__(place)
        with self._rows() as rows:
            columns = rows.fieldnames or []
        wanted = COLUMNS if column is None else (column,)
        self.column = next((name for name in wanted if name in columns), None)
        if self.column is None:
            raise UsageError(
                f"{place} has the columns {some(columns) or '(none)'}, and none is {' or '.join(wanted)}",
                "name the column of the paths with --column",
            )
        self._asks = PROMPT in columns and self.column != PROMPT
        if self._asks:
            with _readable(place), place.open("rb") as file:
                self.prompts = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    @contextmanager
    def _rows(self) -> Iterator[csv.DictReader[str]]:
        with _readable(self.place), self.place.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            try:
                yield rows
            except csv.Error as error:
                raise UsageError(
                    f"{self.place}, line {rows.reader.line_num}: {error}", "write it as standard CSV"
                ) from error
            except UnicodeDecodeError as error:
                line = rows.reader.line_num + 1
                raise UsageError(f"{self.place} is not UTF-8 text, from line {line} on", "save it in UTF-8") from error

    def __iter__(self) -> Iterator[Found]:
        with self._rows() as rows:
            named = (self._row(rows.line_num, row) for row in rows)
            for name, same in itertools.groupby(named, key=lambda row: row[0]):
                prompts = tuple(dict.fromkeys(prompt for _, prompt in same)) if self._asks else ()
                yield replace(_named(name, self.place.parent), prompts=prompts)

    def _row(self, line: int, row: dict[str, str]) -> tuple[str, str]:
        assert self.column is not None
        name, prompt = row.get(self.column) or "", row.get(PROMPT) or ""
        if None in row:
            raise UsageError(
                f"{self.place}, line {line} has too many fields", "put text that holds a comma in double quotes"
            )
        if not name or (self._asks and not prompt.strip()):
            raise UsageError(f"{self.place}, line {line} has an empty field", "fill in every path and prompt")
        return name, prompt


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Says in words that a file cannot be read."""
    try:
        yield
    except OSError as error:
        if trouble := passing(error):
            raise PassingError(f"cannot read {place}: {trouble.message}", trouble.hint) from error
        raise UsageError(f"cannot read {place}: {error.strerror}", "check the path") from error


def _named(name: str, folder: Path) -> Found:
    """Finds what a list names: a path relative to its folder, or a URL."""
    if is_web(name):
        return Found(name, folder, "a tar file in the web; download it" if name.lower().endswith(TAR) else "", url=name)
    try:
        return Found(name, path_of(name, folder))
    except DataError as error:
        return Found(name, folder, error.message)


def _members(file: Found) -> Iterator[Found]:
    """Yields a file as it is, or the pictures in a tar file; where that is broken, those before, then the file."""
    if file.problem or not file.name.lower().endswith(TAR):
        yield file
        return
    known: set[str] = set()
    try:
        if not stat.S_ISREG(os.stat(file.path).st_mode):
            yield file
            return
        tar = tarfile.open(file.path, "r:", encoding="utf-8")
    except (OSError, tarfile.TarError) as error:
        yield _broken(file, error)
        return
    with tar:
        while True:
            try:
                member = tar.next()
            except Exception as error:  # headers hold anything
                yield _broken(file, error)
                return
            if member is None:
                return
            name = member.name.removeprefix("./")
            path = PurePosixPath(name)
            if path.suffix.lower() not in ENDINGS or path.name.startswith(".") or name in known:
                continue
            known.add(name)
            plain = member.isreg() and not member.issparse()
            found = replace(file, name=f"{file.name}/{name}", part=(member.offset_data, member.size))
            yield found if plain else replace(found, problem="not a plain file in its tar file")


def _broken(file: Found, error: Exception) -> Found:
    if trouble := passing(error):
        raise PassingError(f"cannot read {file.path}: {trouble.message}", trouble.hint) from error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return replace(file, problem=f"broken tar file: {reason or type(error).__name__}")
