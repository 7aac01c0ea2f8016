"""Writing files whole: a draft beside the file takes its place, so that a reader sees the old one or the new one."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vlmfix.errors import DataError, UsageError

DRAFT = ".vlmfix-"
"""Stands in a draft's name between the file's own and eight random digits: drafts are told from all other files."""
SHORT = 60
"""Characters of the file's name in its draft's: the whole is at most 255 bytes in UTF-8."""
NAME = 255
"""Bytes that file systems allow a name."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def path_of(text: str) -> Path:
    """Returns the path that a parameter names; ``~`` and ``~NAME`` at its beginning stand for a home folder.

    Raises:
        UsageError: There is no such home, or no file can have that name.
    """
    if "\0" in text:
        raise UsageError(f"{text!r} is no path", "write the path of a file")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{text}: there is no such home folder", "write the path out, or ./~ for a file") from error


def resolved(path: Path) -> Path:
    """Returns an absolute path with its links followed, as far as they can be.

    ``Path.resolve`` raises where links go in a circle; whoever opens the path then says so in better words. Questions
    such as ``Path.exists`` raise likewise for names that are too long, so ask ``os.path.exists``, which says no.

    Args:
        path: The path, which need not exist and holds no zero byte.
    """
    return Path(os.path.realpath(path))


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, as far as they are missing.

    Raises:
        DataError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "free some space and start again" if error.errno in FULL else "choose another folder"
        raise DataError(f"cannot make the folder {folder}: {error.strerror}", hint) from error


@contextmanager
def replacing(path: Path, *, tidied: bool = False) -> Iterator[BinaryIO]:
    """Hands out a draft, which takes the file's place when all of it is on the disk.

    The draft has a name that no file has, so nothing else is written to, wherever links lead. Where ``path`` is a link,
    the link is replaced and not what it leads to. Drafts of the same file that a kill has left are removed, those that
    somebody is writing are not.

    Args:
        path: The file; its folder must exist.
        tidied: Says that the folder's only writer has removed such drafts: one that writes thousands of files need not
            look through all of them each time.

    Yields:
        The draft, empty, to be written; locked against other processes.

    Raises:
        DataError: The file cannot be written, or is a device or a folder; what was there stays.
    """
    from filelock import lock_descriptor  # a third of the time that --help takes

    draft = path.with_name(f".{path.name[:SHORT]}{DRAFT}{secrets.token_hex(4)}")
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot write {path}: it is not a file", "choose another name")
        try:
            if not tidied:
                _remove_abandoned(path)
            with draft.open("x+b") as file:
                lock_descriptor(file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def _remove_abandoned(path: Path) -> None:
    """Removes the drafts of a file that no process holds."""
    from filelock import lock_descriptor

    start = f".{path.name[:SHORT]}{DRAFT}"
    for draft in path.parent.iterdir():
        if draft.name.startswith(start) and is_draft(draft) and os.path.isfile(draft):
            with suppress(FileNotFoundError), draft.open("rb") as file:
                if lock_descriptor(file.fileno(), blocking=False):
                    draft.unlink()


def remove_drafts(folder: Path, *names: str) -> None:
    """Removes the drafts of some files, which a kill has left; only whoever alone writes these files may do so.

    Args:
        folder: Where the files lie.
        *names: Their names; without any, every draft in the folder is removed.

    Raises:
        DataError: The folder cannot be read or written to.
    """
    starts = tuple(f".{name[:SHORT]}{DRAFT}" for name in names) or ("",)
    try:
        for path in folder.iterdir():
            if path.name.startswith(starts) and is_draft(path):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def is_draft(path: Path) -> bool:
    """Whether a file has the name of a draft."""
    start, mark, end = path.name.rpartition(DRAFT)
    return start.startswith(".") and mark != "" and len(end) == 8 and set(end) <= set("0123456789abcdef")


def plain_name(text: str, room: int = NAME) -> str:
    """A name that a file can have, for any text, and another one for every other text that needs changing.

    Slashes become low lines, as they always have. What else a name cannot be (too long, control characters, hidden, no
    characters of the file system's) is taken out, and the text's digest is put behind.

    Args:
        text: What the file is about.
        room: Bytes that the name may have.
    """
    name = text.replace("/", "_")
    plain = "".join(sign if sign.isprintable() else "_" for sign in name.lstrip("."))
    if plain == name and 0 < len(os.fsencode(name)) <= room:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
    short = os.fsencode(plain)[: room - len(digest) - 1].decode(errors="ignore")
    return f"{short}-{digest}"


def cannot_write(path: Path, error: OSError) -> DataError:
    """Says that a file cannot be written, why, and what to do."""
    hints = {
        **dict.fromkeys(FULL, "free some space and start again"),
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    hint = hints.get(error.errno or 0, "choose a folder that you may write to")
    return DataError(f"cannot write {path}: {error.strerror or error}", hint)
