"""Find and open the pictures of a folder."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, UnidentifiedImageError

from vlmfix.cells import cell
from vlmfix.errors import DataError, PassingError, UsageError, passing
from vlmfix.kinds import kind_named, kind_of
from vlmfix.metadata import without_metadata
from vlmfix.pixels import check_size, check_tiles, rgb, turn
from vlmfix.web import fetched, in_data_url, is_web, path_of

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""What is read, told by a file's content; its extension does not matter."""

T = TypeVar("T")

HERE = Path()
CALLED = 200
"""Characters of an address in a message."""
NO_CONTENT = "not a file with content (a device, socket or pipe)"

BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

PAUSES = (0.1, 0.5, 0.0)
"""Seconds after each attempt to open a picture in which trouble that passes may pass."""
READERS = max(2, min(8, (os.cpu_count() or 1) - 1))
"""Pictures that are opened at once."""
AHEAD = 8
"""Pictures that wait, decoded, for the model, or as many as a batch has: it never waits for the disk, and memory stays
bounded."""


@dataclass(frozen=True)
class Found:
    """One file below a folder.

    Attributes:
        name: Path relative to the folder, with forward slashes.
        path: Where it is.
        problem: Why it cannot be a picture; empty when it may be one.
        prompts: Questions about it alone; empty where all pictures are asked the same.
        part: Offset and length, in bytes, of a picture that stands in a tar file; None for a whole file.
        url: Its address in the web, for one that is not on this machine; ``path`` then says nothing.
        cell: Column and row of a picture that stands in a Parquet file; None for a file of its own.
    """

    name: str
    path: Path
    problem: str = ""
    prompts: tuple[str, ...] = ()
    part: tuple[int, int] | None = None
    url: str = ""
    cell: tuple[str, int] | None = None


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
    if os.path.isfile(folder):
        yield Found(folder.name, folder)
        return
    try:
        top = os.stat(folder)
        os.scandir(folder).close()
    except (OSError, ValueError) as error:  # the latter of a zero byte in the name
        hint = "give a picture, or a folder with pictures"
        if kind := kind_named(folder.name):
            raise DataError(f"{folder}: {kind}", hint) from error
        reason = getattr(error, "strerror", error)
        raise DataError(f"cannot read {folder}: {reason}", hint) from error
    left_out = _identity(os.stat(skip)) if skip is not None and os.path.exists(skip) else None
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
            broken = "broken link" if os.path.islink(path) else "cannot be read"
            # trouble that passes may be over when the file is opened
            yield Found(label, path, "" if passing(error) else f"{broken}: {error.strerror}")
            continue
        identity = _identity(status)
        if not stat.S_ISDIR(status.st_mode):
            regular = stat.S_ISREG(status.st_mode)
            yield Found(label, path, "" if regular else NO_CONTENT)
        elif identity in above:
            yield Found(label, path, "link to a folder that it lies in")
        elif identity != left_out:
            yield from _walk(path, f"{label}/", (*above, identity), left_out)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def open_picture(path: str | Path) -> Picture:
    """Decodes one picture file: first frame, turned as EXIF says, RGB, transparency over white.

    Sixteen-bit greys are scaled to eight bits. Colour profiles are not applied. Metadata that cannot be read say
    nothing: the picture is then taken as it lies.

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP or GIF file.

    Raises:
        DataError: The file is no such picture, is empty, broken or cut off, is too thin (``vlmfix.pixels.LONGEST``) or
            has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``; the message is the reason alone, without the path.
        PassingError: It cannot be read now, and that is no fault of the file's.
    """
    with (
        _as_data_errors(),
        Path(path).open("rb", buffering=0) as raw,
        _Clamped(raw) as file,
    ):
        if os.fstat(file.fileno()).st_size == 0:
            raise DataError("empty file")
        image = _read(file, _decoded)
        file.seek(0)
        return Picture(image=image, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def open_found(file: Found) -> Picture:
    """Decodes a picture of a source, which may stand in a tar or Parquet file or in the web; see ``open_picture``.

    Raises:
        DataError: It is no picture, for the reasons that a file is none.
        PassingError: It cannot be read now.
    """
    if file.problem:
        raise DataError(file.problem)
    if file.url:
        return _in_web(file.url)
    if (kind := kind_named(file.path.name)) and not os.path.lexists(file.path):
        raise DataError(kind)  # a name that is misspelt would be told of a file that is not read at all
    with _as_data_errors():
        if not stat.S_ISREG(os.stat(file.path).st_mode):
            raise DataError(NO_CONTENT)
        if (content := _inner(file)) is not None:
            return _picture(content)
    return open_picture(file.path)


def _in_web(address: str) -> Picture:
    """Decodes a picture of the web; what its name says is none is not fetched."""
    if kind := kind_named(re.split(r"[?#]", address, maxsplit=1)[0]):
        raise DataError(kind)
    return _picture(fetched(address))


def _picture(content: bytes) -> Picture:
    return Picture(image=picture_of(content), sha256=hashlib.sha256(content).hexdigest())


def digest_of(file: Found) -> str | None:
    """Computes the hex sha256 of a picture's bytes; None where they cannot be read."""
    try:
        if (content := fetched(file.url) if file.url else _inner(file)) is not None:
            return hashlib.sha256(content).hexdigest()
        with file.path.open("rb") as whole:
            return hashlib.file_digest(whole, "sha256").hexdigest()
    except (OSError, DataError, PassingError):
        return None


def _inner(file: Found) -> bytes | None:
    """Returns the bytes of a picture that stands in a tar or a Parquet file; None for a file of its own."""
    if file.cell is not None:
        return cell(file.path, *file.cell)
    return None if file.part is None else _part(file.path, *file.part)


def _part(path: Path, start: int, length: int) -> bytes:
    with path.open("rb", buffering=0) as raw, _Clamped(raw) as file:
        file.seek(start)
        content = file.read(length)
    if len(content) < length:
        raise DataError("cut off: its tar file ends before it does")
    return content


def picture_of(content: bytes) -> Image.Image:
    """Decodes the bytes of a picture file; see ``open_picture``.

    Raises:
        DataError: They are no such picture, for the reasons that a file is none.
        PassingError: They cannot be decoded now, for lack of memory.
    """
    with _as_data_errors():
        if not content:
            raise DataError("empty file")
        return _read(BytesIO(content), _decoded)


@contextmanager
def _as_data_errors() -> Iterator[None]:
    """Gives whatever reading a picture raises inside the block as the reason why it cannot be read."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not a picture ({', '.join(FORMATS)} are read)") from error
    except BOMBS as error:
        raise DataError(f"too large: {error}") from error
    except OSError as error:
        raise passing(error) or DataError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise passing(error) or DataError(f"broken picture: {type(error).__name__}: {error}") from error


class _Clamped(BufferedReader):
    """A file that is never asked for more bytes than it has: a damaged one names lengths of gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def begins_like_a_picture(path: Path) -> bool:
    """Whether a file is a picture as far as its beginning tells: it may be broken further on, or too large."""
    try:
        with path.open("rb", buffering=0) as raw, _Clamped(raw) as file:
            _read(file, lambda content: Image.open(content, formats=FORMATS).close())
            return True
    except BOMBS:
        return True
    except Exception as error:  # Pillow's readers raise nearly anything on a file that is no picture
        if trouble := passing(error):
            raise trouble from error
        return False


def _read(file: BinaryIO, read: Callable[[BinaryIO], T]) -> T:
    """What is read of a picture file; where that fails, of the same file without its metadata."""
    try:
        return read(file)
    except (DataError, *BOMBS):
        raise
    except Exception as error:  # of no common kind
        if passing(error):
            raise
        file.seek(0)
        if isinstance(error, UnidentifiedImageError) and (kind := kind_of(file.read(16))):
            raise DataError(kind) from error
        file.seek(0)
        content = file.read()
        for exif in (True, False):
            bare = without_metadata(content, exif=exif)
            try:
                return read(BytesIO(bare or b""))
            except (DataError, *BOMBS):
                raise
            except Exception as second:  # it is not the metadata alone, and the first reason is raised below
                if passing(second):
                    raise
                continue
        raise


def _decoded(file: BinaryIO) -> Image.Image:
    with Image.open(file, formats=FORMATS) as opened:
        check_size(*opened.size)
        check_tiles(opened)
        bits = _png_bits(file)
        opened.load()  # what is wrong with the pixels shows here, and not where the metadata are read
        how = turn(opened)
        image = rgb(opened, bits=bits)
        image = image.copy() if how is None else image.transpose(how)
        image.info = {}  # it has been applied, and nobody is to apply it again
        return image


def _png_bits(file: BinaryIO) -> int:
    """Bits of a sample, which Pillow does not tell of a PNG; 8 for other formats."""
    place = file.tell()
    file.seek(0)
    head = file.read(25)
    file.seek(place)
    return head[24] if head.startswith(b"\x89PNG") else 8


def picture_at(address: str | Path, *, folder: Path = HERE) -> Picture:
    """Decodes the picture at a path, or at a URL: ``http(s)://``, ``file://`` or ``data:``; see ``open_picture``.

    Args:
        address: The path or the URL.
        folder: Folder that paths are relative to.

    Raises:
        DataError: It is no picture; the message is the reason alone.
        PassingError: It cannot be read now.
    """
    if isinstance(address, str):
        if is_web(address):
            return _in_web(address)
        if (content := in_data_url(address)) is not None:
            return _picture(content)
        address = path_of(address, folder)
    return open_found(Found("", folder / address))


def named_picture(address: str) -> Image.Image:
    """Decodes the one picture that somebody named; see ``picture_at``.

    Raises:
        UsageError: There is no such file.
        DataError: It is no picture; the message begins with the address.
        PassingError: It cannot be read now; the message begins with the address.
    """
    called = address if len(address) <= CALLED else f"{address[:CALLED]}..."
    try:
        elsewhere = is_web(address) or address[:5].lower() == "data:" or kind_named(address)
        if not (elsewhere or os.path.exists(path_of(address, HERE))):
            raise UsageError(f"there is no file {called}", "give a picture, or its address; the question comes last")
        return picture_at(address).image
    except DataError as error:
        raise DataError(f"{called}: {error.message}", "give a JPEG, PNG, WebP, TIFF, BMP or GIF file") from error
    except PassingError as error:
        raise PassingError(f"{called}: {error.message}", error.hint) from error


def read_ahead(
    files: Iterable[Found], *, batch: int = 1
) -> Generator[tuple[Found, Picture | DataError | PassingError]]:
    """Opens pictures in background threads, a few ahead of the caller, in order; ``close()`` ends the threads.

    Args:
        files: What to open; taken one by one as the caller goes on.
        batch: Pictures that the caller takes at once.

    Yields:
        Each file with its picture, or with the error that says why there is none; trouble that passes has then been
        waited for.
    """
    waiting: deque[tuple[Found, Future[Picture | DataError | PassingError]]] = deque()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="vlmfix-pictures")
    try:
        for file in files:
            waiting.append((file, pool.submit(_open_or_error, file)))
            if len(waiting) >= max(AHEAD, batch):
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _open_or_error(file: Found) -> Picture | DataError | PassingError:
    """Opens a picture in several attempts; trouble that the web still has in the last one is that picture's fault.

    A list may hold dead addresses in a row, and would else never come to those behind them.
    """
    for pause in PAUSES:
        try:
            return open_found(file)
        except DataError as error:
            return error
        except PassingError as error:
            trouble = error
            time.sleep(pause)
    return DataError(f"{trouble.message}, in {len(PAUSES)} attempts") if file.url else trouble
