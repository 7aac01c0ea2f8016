"""Finds and reads what was measured on a model, profiles or directions: a file again only when it changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from vlmfix.errors import DataError
from vlmfix.files import path_of, resolved
from vlmfix.models.checkpoint import Checkpoint

_State = tuple[Callable[[Path], Any], Path, int, int]
"""What reads a file, and the file's identity: path, time of change, size."""
_READ: WeakKeyDictionary[nn.Module, dict[_State, Any]] = WeakKeyDictionary()


class Measured(Protocol):
    """What was measured on one model."""

    def check(self, vlm: Checkpoint) -> None:
        """Makes sure that it was measured on this model."""


T = TypeVar("T", bound=Measured)


def file_for(vlm: Checkpoint, file: str | None, name: str) -> Path | None:
    """Returns the file to read: the one that is named, or the one in the model's folder if it exists.

    Args:
        vlm: The model.
        file: The file that is named; a leading ``~`` is the home directory.
        name: What the one in the model's folder is called.
    """
    if file is not None:
        return path_of(file)
    beside = None if vlm.folder is None else vlm.folder / name
    return beside if beside is not None and os.path.isfile(beside) else None


def read_once(
    vlm: Checkpoint, path: Path, load: Callable[[Path], Mapping[str, T]], *, failed: str, hint: str
) -> Mapping[str, T]:
    """Reads all that a file holds, and makes sure that it was measured on this model.

    Args:
        vlm: The model, with which the result is kept.
        path: The file.
        load: Reads it.
        failed: Begins the message when the file cannot be read.
        hint: What to do then.

    Raises:
        DataError: The file cannot be read, or ``load`` refuses it.
        ProfileMismatchError: Something in it was measured on another model.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise DataError(f"{failed} {path}: {error.strerror}", hint) from error
    known = _READ.setdefault(vlm.model, {})
    state = (load, resolved(path), about.st_mtime_ns, about.st_size)
    if state not in known:
        found = load(path)
        for held in found.values():
            held.check(vlm)
        known[state] = found
    every: Mapping[str, T] = known[state]
    return every
