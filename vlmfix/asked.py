"""What users hand over from Python, pictures, questions and numbers: checked at once, before a model sees anything."""

from __future__ import annotations

import io
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.images import CALLED, picture_at
from vlmfix.pixels import check_size, check_tiles, rgb

MOST = 2**31 - 1
"""The largest number of tokens, beams or rows that may be asked for."""

Shown = Image.Image | str | Path | NDArray[np.uint8]
"""A picture: one of Pillow's, a path or a URL, or the bytes of its pixels."""
KINDS = Image.Image | str | Path | np.ndarray
CHANNELS = (3, 4)

_Made = dict[tuple[int, int] | str, tuple[Any, Image.Image]]
"""By the number of an object and of its frame, or by the address: the object, whose number is its own while it is
kept, and it in RGB."""

TEXTS_AND_FILES = (str, bytes, bytearray, memoryview, io.IOBase)
"""What Python can go through like a list although it is none of pictures or questions."""


def pictures_of(pictures: Any, *, first: int = 0) -> list[list[Image.Image]]:  # noqa: ANN401 (whatever users give)
    """Checks pictures and brings them to one form.

    Args:
        pictures: B pictures, or B lists of them, which may be empty: PIL pictures of any mode, paths and URLs of files
            as ``images.picture_at`` reads them, or uint8 arrays, (height, width) greys or (height, width, 3 or 4).
        first: Number of the first of them, for messages.

    Returns:
        B lists of RGB pictures. An RGB picture stays the same object, unless it is an open file; one object, and one
        address, becomes one object.

    Raises:
        DataError: They are something else, or there is a picture that cannot be read or shown.
    """
    if isinstance(pictures, Image.Image):
        raise DataError(
            "pictures is one picture", "give a list of pictures, one for each question: [picture] for a single one"
        )
    made: _Made = {}
    rows = []
    for number, shown in enumerate(_items(pictures, "pictures"), first):
        place = f"pictures[{number}]"
        if isinstance(shown, KINDS):
            rows.append([_picture(shown, place, made)])
        else:
            named = ((f"{place}[{inner}]", one) for inner, one in enumerate(_items(shown, place)))
            rows.append([_picture(one, name, made) for name, one in named])
    return rows


def questions_of(prompts: Any, rows: int, *, silent: bool = False) -> list[Any]:  # noqa: ANN401 (whatever users give)
    """Checks questions and gives every row its own.

    Args:
        prompts: One question for all rows, or a list with one for each.
        rows: B, rows of pictures.
        silent: Whether a row may have None for a question.

    Returns:
        B questions.

    Raises:
        DataError: There are no rows, their numbers differ, or a question is no text.
    """
    asked = [prompts] * rows if isinstance(prompts, str) else list(_items(prompts, "prompts", "questions"))
    for number, question in enumerate(asked):
        if question is None and silent:
            continue
        if not isinstance(question, str):
            raise DataError(f"prompts[{number}] is {_kind(question)}", "a question is a text")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"prompts[{number}] has a character that is no text: {question[error.start : error.end]!r}",
                "read the text with its own encoding, mostly UTF-8",
            ) from error
    if len(asked) != rows or not rows:
        raise DataError(f"{rows} pictures and {len(asked)} prompts", "give one prompt for all, or one per picture")
    return asked


def whole(name: str, value: Any, least: int, most: int = MOST) -> int:  # noqa: ANN401 (whatever users give)
    """Checks a whole number.

    Args:
        name: What it is called.
        value: An int, or what counts as one, such as numpy's.
        least: The smallest that is allowed.
        most: The largest.

    Raises:
        UsageError: It is no whole number, or out of range.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not least <= found <= most:
        written = f"{name}={value!r}" if found is None or abs(found) <= 1 << 64 else f"{name} of so many digits"
        raise UsageError(f"{written} is not allowed", f"{name} is a whole number in [{least}, {most}]")
    return found


def number(name: str, value: Any) -> float:  # noqa: ANN401 (whatever users give)
    """Checks that something is a number, numpy's among them; its range is the caller's matter.

    Args:
        name: What it is called.
        value: The number.

    Raises:
        UsageError: It is none, or NaN.
    """
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # an int beyond every float
        found = math.inf if value > 0 else -math.inf
    if math.isnan(found):
        raise UsageError(f"{name}={value!r} is not allowed", f"{name} is a number")
    return found


def _picture(given: Any, place: str, made: _Made) -> Image.Image:  # noqa: ANN401
    """One picture in RGB."""
    if isinstance(given, str | Path):
        if f"{given}" not in made:
            made[f"{given}"] = given, _opened(given, place)
        return made[f"{given}"][1]
    if isinstance(given, np.ndarray):
        if (id(given), 0) not in made:
            made[id(given), 0] = given, _of_array(given, place)
        return made[id(given), 0][1]
    if not isinstance(given, Image.Image):
        raise DataError(f"{place} is {_kind(given)}", _what_to_give(given))
    key = id(given), given.tell()  # going through the frames of a file gives one object again and again
    if key not in made:
        try:
            check_size(*given.size)
            check_tiles(given)
            given.load()
            picture = rgb(given)
            made[key] = given, picture.copy() if isinstance(picture, ImageFile) else picture
        except DataError as error:
            raise DataError(f"{place}: {error.message}", "give another picture, or leave it out") from error
        except Exception as error:  # a file that is broken or closed, a mode that Pillow cannot convert
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{place} cannot be read: {reason}", "give a picture that can be loaded as RGB") from error
    return made[key][1]


def _opened(address: str | Path, place: str) -> Image.Image:
    try:
        return picture_at(address).image
    except DataError as error:
        hint = "give a path or a URL of a JPEG, PNG, WebP, TIFF, BMP or GIF file, or leave it out"
        raise DataError(f"{place}, {str(address)[:CALLED]!r}: {error.message}", hint) from error
    except PassingError as error:
        raise PassingError(f"{place}, {str(address)[:CALLED]!r}: {error.message}", error.hint) from error


def _of_array(array: NDArray[Any], place: str) -> Image.Image:
    """A picture whose pixels are given."""
    shape = array.shape
    if array.dtype != np.uint8 or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in CHANNELS):
        raise DataError(
            f"{place} is an array of {array.dtype} and shape {shape}",
            "an array is of uint8, and (height, width), or (height, width, 3) or 4, in the order of RGB",
        )
    try:
        check_size(shape[1], shape[0])
    except DataError as error:
        raise DataError(f"{place}: {error.message}", "give another picture, or leave it out") from error
    return rgb(Image.fromarray(array))


def _items(given: Any, name: str, what: str = "pictures") -> Iterable[Any]:  # noqa: ANN401
    """What a list, or the like, holds; never the lines of an array, the letters of a text or the lines of a file."""
    if isinstance(given, Sequence | Iterator) and not isinstance(given, TEXTS_AND_FILES):
        return given
    hint = _what_to_give(given) if what == "pictures" else "give one question for all pictures, or a list of questions"
    raise DataError(f"{name} is {_kind(given)}", hint)


def _kind(given: Any) -> str:  # noqa: ANN401
    if given is None:
        return "None"
    shape = getattr(given, "shape", None)
    name = type(given).__name__
    return f"of type {name}" if shape is None else f"of type {name} and shape {tuple(shape)}"


def _what_to_give(given: Any) -> str:  # noqa: ANN401
    """How to make a list of pictures of what was given."""
    if isinstance(given, str | Path):
        how = "[path] for a single one"
    elif isinstance(given, np.ndarray):
        how = "list(array) for one that holds several pictures, [array] for a single one"
    elif hasattr(given, "shape"):
        how = "tensor.permute(1, 2, 0).numpy() makes an array of (3, height, width) bytes"
    elif isinstance(given, TEXTS_AND_FILES):
        how = "PIL.Image.open(file) opens a file, which may be io.BytesIO(content)"
    else:
        how = "[] stands for no picture"
    return f"give a list of pictures, paths or arrays, or of lists of them, one for each question; {how}"
