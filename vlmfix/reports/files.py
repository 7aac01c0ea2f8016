"""The files that a comparison leaves in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.comparison.compare import Comparison
from vlmfix.evals.record import COMPARISON
from vlmfix.figures import MAKERS, check_target
from vlmfix.files import cannot_write, make_folder, replacing
from vlmfix.reports.pages import NAME, Report, report_of
from vlmfix.reports.plots import differences
from vlmfix.reports.tables import csv_text, markdown
from vlmfix.view.page import refuse_foreign, write_page

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


def check_path(path: Path) -> None:
    """Makes sure, before any work is done, that a comparison can go to a file; see ``save_as``.

    Raises:
        UsageError: Its name ends in none of these.
        DataError: It is there and is of something else.
    """
    ending = path.suffix.lower()
    if ending in MAKERS:
        check_target(path)
    elif ending == ".html":
        refuse_foreign(path, NAME)
    elif ending != ".tex":
        known = ", ".join((".tex", ".html", *MAKERS))
        raise UsageError(f"{path} ends in none of {known}", "LaTeX, HTML and drawings are written")
    elif os.path.exists(path) and not _begins(path, f"% {NAME}"):
        raise DataError(f"{path} is there and is no table of {NAME}", "choose another file, or remove that one")


def save_as(comparison: Comparison, path: Path) -> None:
    """Writes a comparison in the form that a file's name asks for.

    Args:
        comparison: What to write.
        path: A ``.tex`` file for LaTeX tables, ``.html`` for a page, ``.svg``, ``.pdf`` or ``.png`` for the plot.

    Raises:
        UsageError: The name ends in none of these; or there are no differences to draw.
        DataError: The file cannot be written, or is of something else.
    """
    check_path(path)
    ending = path.suffix.lower()
    if ending not in MAKERS:
        save_report(report_of(comparison, draws=ending == ".html"), path)
    elif not comparison.arms:
        raise UsageError(f"{path}: there are no arms, and so no differences to draw", "add arms, or leave it out")
    else:
        differences(comparison, path)


def save_report(report: Report, path: Path) -> None:
    """Writes a report as a page (``.html``) or as LaTeX tables.

    Raises:
        UsageError: A drawing is asked for.
        DataError: The file cannot be written, or is of something else.
    """
    if path.suffix.lower() in MAKERS:
        raise UsageError(f"{path}: there is no plot over seeds", "take .tex or .html")
    check_path(path)
    if path.suffix.lower() == ".html":
        write_page(path, report.page(), NAME)
        return
    with replacing(path) as file:
        file.write(report.latex().encode(errors="backslashreplace"))


def _begins(path: Path, words: str) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(words)) == words.encode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "choose another file") from error


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
