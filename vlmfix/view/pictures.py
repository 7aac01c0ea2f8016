"""Pictures for a page: small, and only those that the answers are about."""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path, PurePosixPath

from PIL import Image

from vlmfix.errors import DataError, PassingError
from vlmfix.images import Found, Picture, read_ahead
from vlmfix.view.sheet import PictureFile

LONGER_SIDE = 480
"""Pixels; a page of 200 such pictures is some megabytes."""
QUALITY = 85
GONE = "The picture is no longer where it was."
CHANGED = "The file was changed since: the model saw another picture."
OUTSIDE = "The name leads out of the folder of the pictures."


def below(folder: Path, name: str) -> Path | None:
    """Finds the place of a picture that answers name.

    Args:
        folder: The folder of the pictures, or the one picture.
        name: Path below the folder, with forward slashes.

    Returns:
        The place; None for a name that leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        return None
    return folder if os.path.isfile(folder) and name == folder.name else folder.joinpath(*parts)


def small_pictures(pictures: Iterable[PictureFile]) -> Generator[bytes | str]:
    """Opens pictures, a few ahead of the caller, and makes them small.

    Yields:
        For each the bytes of a JPEG, or in a sentence why there is none to be seen.
    """
    listed = list(pictures)
    files = map(_found, listed)
    with closing(read_ahead(files)) as opened:
        for picture, (_, found) in zip(listed, opened, strict=True):
            yield _shown(picture, found)


def originals(pictures: Iterable[PictureFile]) -> Generator[Image.Image | None]:
    """Opens pictures, a few ahead of the caller; None for one that is gone, or not the one that the model saw."""
    listed = list(pictures)
    files = map(_found, listed)
    with closing(read_ahead(files)) as opened:
        for picture, (_, found) in zip(listed, opened, strict=True):
            same = isinstance(found, Picture) and picture.sha256 in ("", found.sha256)
            yield found.image if isinstance(found, Picture) and same else None


def _found(picture: PictureFile) -> Found:
    return Found(picture.name, *_place(picture), part=picture.part, url=picture.url, cell=picture.cell)


def _place(picture: PictureFile) -> tuple[Path, str]:
    """Where to open a picture, and why not to; a pipe would never end."""
    if picture.path is None:
        return Path(), OUTSIDE
    if picture.url:
        return picture.path, ""
    return picture.path, "" if os.path.isfile(picture.path) else GONE


def _shown(picture: PictureFile, found: Picture | DataError | PassingError) -> bytes | str:
    if not isinstance(found, Picture):
        ours = found.message in (OUTSIDE, GONE)
        return found.message if ours else f"The picture cannot be shown: {found.message}."
    if picture.sha256 and picture.sha256 != found.sha256:
        return CHANGED
    return small(found.image)


def small(picture: Image.Image) -> bytes:
    """Makes a small JPEG of a picture."""
    image = picture.copy()
    image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()
