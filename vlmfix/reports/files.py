"""The files that a comparison leaves in a folder."""

from __future__ import annotations

from pathlib import Path

from vlmfix.errors import DataError
from vlmfix.evals.compare import Comparison
from vlmfix.reports.plots import differences
from vlmfix.reports.tables import csv_text, markdown

NAME = "comparison"


def save(comparison: Comparison, folder: Path) -> list[Path]:
    """Write a comparison as CSV, Markdown and plot.

    Args:
        comparison: What to write.
        folder: Where; made when it is missing. Files of an earlier comparison are replaced.

    Returns:
        ``comparison.csv``, ``comparison.md`` and, where there are arms beside the plain one, ``comparison.png``.

    Raises:
        DataError: A file cannot be written.
    """
    table, text, plot = (folder / f"{NAME}.{ending}" for ending in ("csv", "md", "png"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.write_text(csv_text(comparison), encoding="utf-8")
        text.write_text(markdown(comparison), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}", "choose another folder") from error
    if not comparison.arms:
        plot.unlink(missing_ok=True)
        return [table, text]
    differences(comparison, plot)
    return [table, text, plot]
