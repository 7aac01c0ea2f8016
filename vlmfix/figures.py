"""Drawings in files: text is drawn as it stands, and a file is written whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from vlmfix.errors import DataError, UsageError
from vlmfix.files import replacing

MAKERS = {".png": "Software", ".pdf": "Creator", ".svg": "Creator"}
"""What is written, by the end of the name, and where such a file says what made it."""
OURS = (b"vlmfix", b"atplotlib")
"""What a drawing says of who made it; the second in those of earlier versions."""


@contextmanager
def literally() -> Iterator[None]:
    """Draws names as they stand: a dollar begins no formula, and a letter that the font lacks is a box."""
    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def check_target(path: Path) -> None:
    """Makes sure, before any work is done, that a drawing can go to a file.

    Raises:
        UsageError: Its folder does not exist, or its name ends in nothing that is drawn.
        DataError: It is there and is no drawing of ours.
    """
    if not os.path.isdir(path.parent):
        raise UsageError(f"there is no folder {path.parent}", "make it, or write elsewhere")
    if path.suffix.lower() not in MAKERS:
        raise UsageError(f"{path} ends in none of {', '.join(MAKERS)}", "PNG, PDF and SVG are written")
    try:
        foreign = path.exists() and (not path.is_file() or not _is_ours(path.read_bytes()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "choose another file") from error
    if foreign:
        raise DataError(f"{path} is there and is no drawing of vlmfix", "choose another file, or remove that one")


def _is_ours(content: bytes) -> bool:
    return not content or any(mark in content for mark in OURS)


def write(figure: Figure, path: Path) -> None:
    """Writes a drawing, whole or not at all.

    Args:
        figure: The drawing.
        path: A PNG, PDF or SVG file; its folder must exist.

    Raises:
        DataError: The file cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in MAKERS:
        raise DataError(f"cannot write {path}: it ends in none of {', '.join(MAKERS)}", "choose another name")
    with replacing(path) as file:
        figure.savefig(file, format=kind[1:], metadata={MAKERS[kind]: "vlmfix"})
