"""Reads the bytes of pictures that stand in a column of a Parquet file, a few rows at a time."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, MissingExtraError
from vlmfix.extras import need

ROWS = 8
"""Rows that are read at once: pictures may be large."""
KEPT = 4
"""Times so many rows stay, for threads that open neighbours."""
FILES = 2
"""Columns that stay open."""
BUFFER = 1 << 20
"""Bytes that are read ahead of a column; without a bound, all of a row group would be."""

_columns: OrderedDict[tuple[Path, str, tuple[int, ...]], _Column] = OrderedDict()
_lock = threading.Lock()


def parquet_file(path: Path) -> Any:  # noqa: ANN401 (pyarrow ships no types)
    """Opens a Parquet file whose columns are read in pieces; with ``pyarrow.parquet.ParquetFile``'s methods.

    Raises:
        MissingExtraError: pyarrow is not installed.
        OSError: The file cannot be read.
        pyarrow.ArrowException: It is no Parquet file.
    """
    need("parquet")
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)


def cell(path: Path, column: str, row: int) -> bytes:
    """Reads the bytes in one cell; neighbours of the last ones are there at once.

    Args:
        path: A Parquet file.
        column: A column of bytes, or of structs with a field ``bytes``.
        row: Number of the row in the file, from 0.

    Raises:
        DataError: The cell is empty, the file is damaged, or it has no such row or column any more.
        MissingExtraError: pyarrow is not installed.
        OSError: The file cannot be read.
    """
    about = os.stat(path)
    key = path, column, (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    with _lock:
        found = _columns.pop(key, None) or _Column(path, column)
        _columns[key] = found
        while len(_columns) > FILES:
            _columns.popitem(last=False)
    return found.at(row)


class _Column:
    """Reads one column forwards, and begins again at a row group where a row is asked for that lies elsewhere."""

    def __init__(self, path: Path, column: str) -> None:
        try:
            self._file, self._name = parquet_file(path), column
        except (OSError, MissingExtraError):
            raise
        except Exception as error:  # Arrow's
            raise DataError(f"its Parquet file is broken: {error}") from error
        if column not in self._file.schema_arrow.names:
            raise DataError(f"its Parquet file has no column {column} any more")
        metadata = self._file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._batches: Iterator[Any] = iter(())
        self._group: int | None = None  # row group that the iterator reads, and the row that it comes to
        self._next = 0
        self._broken: dict[int, tuple[int, str]] = {}  # row groups that cannot be read, from which row on, and why
        self._kept: deque[tuple[int, list[Any]]] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def at(self, row: int) -> bytes:
        with self._lock:
            value = self._value(row)
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise DataError("its cell in the Parquet file holds no bytes")
        return value

    def _value(self, row: int) -> object:
        for start, values in self._kept:
            if start <= row < start + len(values):
                return values[row - start]
        if row >= self._starts[-1]:
            raise DataError("its Parquet file has fewer rows now")
        group = bisect_right(self._starts, row) - 1
        if (trouble := self._broken.get(group)) and row >= trouble[0]:
            raise DataError(trouble[1])
        if group != self._group or row < self._next:
            self._group, self._next = group, self._starts[group]
            self._batches = self._file.iter_batches(
                batch_size=ROWS, row_groups=[group], columns=[self._name], use_threads=False
            )
        try:
            return self._found(row)
        except OSError as error:
            self._group = None
            if error.errno is not None:  # the disk's, and not that of what was read
                raise
            self._broken[group] = self._next, f"its Parquet file is broken: {error}"
            raise DataError(self._broken[group][1]) from error
        except Exception as error:  # Arrow's, of several kinds
            self._group = None
            self._broken[group] = self._next, f"its Parquet file is broken: {type(error).__name__}: {error}"
            raise DataError(self._broken[group][1]) from error

    def _found(self, row: int) -> object:
        for batch in self._batches:
            start, values = self._next, batch.column(0)
            self._next += len(values)
            if row < self._next:
                kept = values.to_pylist()
                self._kept.append((start, kept))
                return kept[row - start]
        raise ValueError("it ends early")
