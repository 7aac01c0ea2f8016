"""The files that a comparison leaves in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmfix.errors import DataError
from vlmfix.evals.comparison.compare import Comparison
from vlmfix.evals.record import COMPARISON
from vlmfix.files import cannot_write, make_folder, replacing
from vlmfix.reports.plots import differences
from vlmfix.reports.tables import csv_text, markdown

COLUMNS = "task,folder,arm,spec,plain_arm,"
"""What the table of every comparison begins with."""


def save(comparison: Comparison, folder: Path) -> list[Path]:
    """Write a comparison as CSV, Markdown and plot.

    Args:
        comparison: What to write.
        folder: Where; made when it is missing. Files of an earlier comparison are replaced.

    Returns:
        ``comparison.csv``, ``comparison.md`` and, where there are arms beside the plain one, ``comparison.png``.

    Raises:
        DataError: A file cannot be written, or a file of that name is none of a comparison.
    """
    table, text, plot = (folder / name for name in COMPARISON)
    make_folder(folder)
    _refuse_foreign(table, (text, plot))
    with replacing(table) as file:
        file.write(csv_text(comparison).encode(errors="backslashreplace"))
    with replacing(text) as file:
        file.write(markdown(comparison).encode(errors="backslashreplace"))
    if not comparison.arms:
        _remove(plot)
        return [table, text]
    differences(comparison, plot)
    return [table, text, plot]


def _refuse_foreign(table: Path, others: Sequence[Path]) -> None:
    """Refuses to write over files of other things: the table's columns show whose the files are."""
    try:
        if table.exists():
            with table.open("rb") as file:
                if file.read(len(COLUMNS)) == COLUMNS.encode():
                    return
        found = [path for path in (table, *others) if path.exists()]
    except OSError as error:
        raise DataError(f"cannot read {table}: {error.strerror}", "choose another folder") from error
    if found:
        raise DataError(f"{found[0]} is there and is of no comparison", "choose another --out, or move the file away")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
