"""Find and open the pictures of a folder."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmfix.errors import DataError, PassingError, UsageError, passing

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""What is read, told by a file's content; its extension does not matter."""

PAUSES = (0.1, 0.5, 0.0)
"""Seconds after each attempt to open a picture in which trouble that passes may pass."""
READERS = 2
AHEAD = 8
"""Pictures that wait, decoded, for the model: it never waits for the disk, and memory stays bounded."""


@dataclass(frozen=True)
class Found:
    """One file below a folder.

    Attributes:
        name: Path relative to the folder, with forward slashes.
        path: Where it is.
        problem: Why it cannot be a picture; empty when it may be one.
    """

    name: str
    path: Path
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture.

    Attributes:
        image: RGB, turned as EXIF says.
        sha256: Hex digest of the file's bytes.
    """

    image: Image.Image
    sha256: str


def find(folder: Path, *, skip: Path | None = None) -> Iterator[Found]:
    """The files below a folder, recursively, sorted by name within each folder.

    Hidden files and folders are passed over. Links are followed; a link that leads back to a folder it
    lies in is reported, not followed. Whether a file is a picture shows only when it is opened.

    Args:
        folder: A folder, or a single file, which is then all that is found.
        skip: A folder to leave out.

    Raises:
        DataError: ``folder`` does not exist or cannot be listed.
        PassingError: A folder below cannot be listed now.
    """
    if folder.is_file():
        yield Found(folder.name, folder)
        return
    try:
        top = os.stat(folder)
        os.scandir(folder).close()
    except OSError as error:
        raise DataError(
            f"cannot read {folder}: {error.strerror}", "give a picture, or a folder with pictures"
        ) from error
    left_out = _identity(os.stat(skip)) if skip is not None and skip.exists() else None
    yield from _walk(folder, "", (_identity(top),), left_out)


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], left_out: tuple[int, int] | None
) -> Iterator[Found]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        if trouble := passing(error):
            raise PassingError(f"cannot list {folder}: {trouble.message}", trouble.hint) from error
        yield Found(prefix.rstrip("/"), folder, f"folder cannot be listed: {error.strerror}")
        return
    for name in names:
        if name.startswith("."):
            continue
        path, label = folder / name, prefix + name
        try:
            status = path.stat()
        except OSError as error:
            broken = "broken link" if path.is_symlink() else "cannot be read"
            # trouble that passes may be over when the file is opened
            yield Found(label, path, "" if passing(error) else f"{broken}: {error.strerror}")
            continue
        identity = _identity(status)
        if not stat.S_ISDIR(status.st_mode):
            regular = stat.S_ISREG(status.st_mode)
            yield Found(label, path, "" if regular else "not a file with content (a device, socket or pipe)")
        elif identity in above:
            yield Found(label, path, "link to a folder that it lies in")
        elif identity != left_out:
            yield from _walk(path, f"{label}/", (*above, identity), left_out)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def open_picture(path: Path) -> Picture:
    """Decodes one picture file: first frame, turned as EXIF says, RGB, transparency over white.

    Sixteen-bit greys are scaled to eight bits. Colour profiles are not applied.

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP or GIF file.

    Raises:
        DataError: The file is no such picture, is empty, broken or cut off, or has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``; the message is the reason alone, without the path.
        PassingError: It cannot be read now, and that is no fault of the file's.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DataError("empty file")
            with Image.open(file, formats=FORMATS) as opened:
                _check_size(*opened.size)
                image = _to_rgb(ImageOps.exif_transpose(opened))
            file.seek(0)
            return Picture(image=image, sha256=hashlib.file_digest(file, "sha256").hexdigest())
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not a picture ({', '.join(FORMATS)} are read)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"too large: {error}") from error
    except OSError as error:
        raise passing(error) or DataError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise passing(error) or DataError(f"broken picture: {type(error).__name__}: {error}") from error


def named_picture(path: Path) -> Image.Image:
    """Decodes the one picture that somebody named; see ``open_picture``.

    Raises:
        UsageError: There is no such file.
        DataError: It is no picture; the message begins with the path.
        PassingError: It cannot be read now; the message begins with the path.
    """
    if not path.exists():
        raise UsageError(f"there is no file {path}", "give a picture")
    try:
        return open_picture(path).image
    except DataError as error:
        raise DataError(f"{path}: {error.message}", "give a JPEG, PNG, WebP, TIFF, BMP or GIF file") from error
    except PassingError as error:
        raise PassingError(f"{path}: {error.message}", error.hint) from error


def read_ahead(files: Iterable[Found]) -> Generator[tuple[Found, Picture | DataError | PassingError]]:
    """Opens pictures in background threads, a few ahead of the caller, in order; ``close()`` ends the threads.

    Args:
        files: What to open; taken one by one as the caller goes on.

    Yields:
        Each file with its picture, or with the error that says why there is none; trouble that passes has then been
        waited for.
    """
    waiting: deque[tuple[Found, Future[Picture | DataError | PassingError]]] = deque()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="vlmfix-pictures")
    try:
        for file in files:
            waiting.append((file, pool.submit(_open_or_error, file)))
            if len(waiting) >= AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _open_or_error(file: Found) -> Picture | DataError | PassingError:
    if file.problem:
        return DataError(file.problem)
    for pause in PAUSES:
        try:
            return open_picture(file.path)
        except DataError as error:
            return error
        except PassingError as error:
            trouble = error
            time.sleep(pause)
    return trouble


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"too large: {width} x {height} pixels, at most {limit} are read")
    if width * height == 0:
        raise DataError(f"no pixels: {width} x {height}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_deep_grey(image)
    if image.mode == "F":
        raise DataError("floating-point pixels have no known range; save the picture with 8 or 16 bits")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Sixteen-bit grey, which Pillow would clip, scaled to eight bits."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(f"grey values from {low} to {high}; 0 to 65535 are read")
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
