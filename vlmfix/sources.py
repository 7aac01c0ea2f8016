"""Lists the pictures of a run one after the other: of a folder, a list of paths, a CSV or Parquet file, or tar files.

Every iteration reads the source anew, so the memory that it takes does not grow with the number of pictures: a folder
needs the names in one folder, a tar file those of its own members.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import stat
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from vlmfix.cells import parquet_file
from vlmfix.errors import DataError, PassingError, UsageError, VlmfixError, passing
from vlmfix.images import Found, find
from vlmfix.parsing import some
from vlmfix.seen import Seen
from vlmfix.web import is_web, path_of

TAR, CSV, PARQUET, LISTS = ".tar", ".csv", ".parquet", (".txt", ".list")
"""Endings that say what a source is; a file with another one is a picture."""
COLUMNS = ("image", "path")
"""Columns of a table that hold paths (or bytes), when none is named."""
PROMPT = "prompt"
"""Column of a table that holds prompts."""
ROWS = 1024
"""Rows of a Parquet file that are listed at once."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
"""Endings of pictures in a tar file; what else is there belongs to them, as labels do."""


class Source(ABC):
    """Lists pictures, as often as it is iterated over.

    Args:
        place: The folder or file.

    Attributes:
        column: Column of the paths or bytes, of a CSV or Parquet file; None of others.
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
        place: A folder, a picture, a tar file, a list (``.txt``, ``.list``), a CSV or a Parquet file.
        column: Column of a table that holds the paths (or bytes, in a Parquet file); None for ``image`` or ``path``.
        skip: A folder to leave out, of a folder.

    Raises:
        UsageError: ``column`` is given for something else than a table, or there is no such column.
        MissingExtraError: It is a Parquet file, and pyarrow is not installed.
        PassingError: The file cannot be read now.
    """
    ending = place.suffix.lower() if os.path.isfile(place) else ""
    if ending == CSV:
        return _Table(place, column)
    if ending == PARQUET:
        return _Parquet(place, column)
    if column is not None:
        raise UsageError(f"{place} is no CSV or Parquet file and has no columns", "leave --column out")
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
        self.column = _column(place, columns, column)
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
            yield from _in_groups(named, self.place.parent, asks=self._asks)

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


class _Parquet(Source):
    """A Parquet file with a column of paths, as in a list, or of the bytes of pictures, and perhaps one of prompts.

    Bytes may stand in structs, in a field ``bytes``, as the datasets library has them. Their pictures are named by the
    file and the number of the row, and are read when they are opened.
    """

    def __init__(self, place: Path, column: str | None) -> None:
        super().__init__(place)
        with self._opened() as file:
            schema = file.schema_arrow
            self.column = _column(place, schema.names, column)
            kind, texts = self._kind(schema.field(self.column).type), [PROMPT] if PROMPT in schema.names else []
            self._asks = bool(texts) and self.column != PROMPT
            if self._asks and self._kind(schema.field(PROMPT).type) != "text":
                raise UsageError(f"{place} has a column {PROMPT} that holds no text", "give it another name")
        if kind == "":
            raise UsageError(
                f"the column {self.column} of {place} holds neither text nor bytes", "name another with --column"
            )
        self._holds_bytes = kind == "bytes"
        self.repeats = not self._holds_bytes
        if self._asks:
            digest = hashlib.sha256()
            for row in self._rows():
                for text in row:
                    content = text.encode(errors="surrogatepass")
                    digest.update(len(content).to_bytes(8, "big") + content)
            self.prompts = f"sha256:{digest.hexdigest()}"

    @staticmethod
    def _kind(kind: Any) -> str:  # noqa: ANN401 (pyarrow ships no types)
        """Says what a column holds: text, bytes, or neither."""
        from pyarrow import types

        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
            return "bytes" if types.is_binary(kind) or types.is_large_binary(kind) else ""
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return "text"
        held = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
        return "bytes" if any(is_so(kind) for is_so in held) else ""

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with _readable(self.place):
            try:
                with parquet_file(self.place) as file:
                    yield file
            except (OSError, VlmfixError):
                raise
            except Exception as error:  # Arrow's, of several kinds
                raise UsageError(f"{self.place} is no whole Parquet file: {error}", "write it anew") from error

    def _rows(self) -> Iterator[tuple[str, str]]:
        """Yields the name and the prompt of each row; an empty prompt where there are none."""
        columns = ([] if self._holds_bytes else [self.column]) + ([PROMPT] if self._asks else [])
        number = 0
        with self._opened() as file:
            if not columns:
                for number in range(file.metadata.num_rows):
                    yield f"{self.place.name}/{number}", ""
                return
            for batch in file.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
                cells = [batch.column(name).to_pylist() for name in columns]
                for row in zip(*cells, strict=True):
                    texts = [text or "" for text in row]
                    if not all(text.strip() for text in texts) or any("\0" in text for text in texts):
                        raise UsageError(
                            f"{self.place}, row {number} has an empty field, or a zero byte",
                            "fill in every path and prompt",
                        )
                    name = f"{self.place.name}/{number}" if self._holds_bytes else texts[0]
                    yield name, texts[-1] if self._asks else ""
                    number += 1

    def __iter__(self) -> Iterator[Found]:
        assert self.column is not None
        if not self._holds_bytes:
            yield from _in_groups(self._rows(), self.place.parent, asks=self._asks)
            return
        for number, (name, prompt) in enumerate(self._rows()):
            yield Found(name, self.place, prompts=(prompt,) if self._asks else (), cell=(self.column, number))


def _column(place: Path, columns: Sequence[str], named: str | None) -> str:
    """Chooses the column of the pictures.

    Raises:
        UsageError: There is none of that name.
    """
    wanted = COLUMNS if named is None else (named,)
    for name in wanted:
        if name in columns:
            return name
    raise UsageError(
        f"{place} has the columns {some(columns) or '(none)'}, and none is {' or '.join(wanted)}",
        "name the column of the pictures with --column",
    )


def _in_groups(rows: Iterable[tuple[str, str]], folder: Path, *, asks: bool) -> Iterator[Found]:
    """Yields what rows of (name, prompt) name, one for those with the same name that follow each other."""
    for name, same in itertools.groupby(rows, key=lambda row: row[0]):
        prompts = tuple(dict.fromkeys(prompt for _, prompt in same)) if asks else ()
        yield replace(_named(name, folder), prompts=prompts)


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Says in words that a file cannot be read."""
    try:
        yield
    except OSError as error:
        if trouble := passing(error):
            raise PassingError(f"cannot read {place}: {trouble.message}", trouble.hint) from error
        raise UsageError(f"cannot read {place}: {error.strerror or error}", "check the path") from error


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
    known = Seen()
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
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all that it has read
            name = member.name.removeprefix("./")
            path = PurePosixPath(name)
            if path.suffix.lower() not in ENDINGS or path.name.startswith(".") or not known.add(name):
                continue
            plain = member.isreg() and not member.issparse()
            found = replace(file, name=f"{file.name}/{name}", part=(member.offset_data, member.size))
            yield found if plain else replace(found, problem="not a plain file in its tar file")


def _broken(file: Found, error: Exception) -> Found:
    if trouble := passing(error):
        raise PassingError(f"cannot read {file.path}: {trouble.message}", trouble.hint) from error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return replace(file, problem=f"broken tar file: {reason or type(error).__name__}")
