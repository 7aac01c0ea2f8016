"""What a decoded picture looks like: turned the right way up, in eight-bit RGB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TILELENGTH, TILEWIDTH, TiffImageFile

from vlmfix.errors import DataError

LONGEST = 200
"""How many times as long as its shorter side the longer side of a picture may be. Some processors refuse more, others
scale the shorter side to a fixed length, and would make gigabytes of a line."""

SIXTEEN_BITS = 65535

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What to do with the pixels, by EXIF's orientation."""


def content(picture: Image.Image) -> bytes:
    """Gives what tells a picture from every other: its mode, its size and its pixels."""
    return f"{picture.mode}{picture.size}".encode() + picture.tobytes()


def digest(pictures: Iterable[Image.Image]) -> str:
    """Names pictures by what they show: hex sha256 of their contents."""
    whole = hashlib.sha256()
    for picture in pictures:
        whole.update(content(picture))
    return whole.hexdigest()


def check_size(width: int, height: int) -> None:
    """Refuses a picture by its size.

    Raises:
        DataError: It has no pixels, more than ``PIL.Image.MAX_IMAGE_PIXELS``, or one side more than ``LONGEST`` times
            as long as the other.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"too large: {width} x {height} pixels, at most {limit} are read")
    if width * height == 0:
        raise DataError(f"no pixels: {width} x {height}")
    if max(width, height) > LONGEST * min(width, height):
        raise DataError(f"too thin: {width} x {height} pixels, one side is more than {LONGEST} times the other")


def check_tiles(image: Image.Image) -> None:
    """Refuses a TIFF whose tiles are larger than a picture may be: one is decoded whole, however small the picture.

    Raises:
        DataError: A tile has more than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and isinstance(image, TiffImageFile):
        width, height = (image.tag_v2.get(tag, 0) for tag in (TILEWIDTH, TILELENGTH))
        if isinstance(width, int) and isinstance(height, int) and width * height > limit:
            raise DataError(f"too large: tiles of {width} x {height} pixels, at most {limit} are read")


def turn(image: Image.Image) -> Image.Transpose | None:
    """How a picture is to be turned, as its metadata say; None for not at all, or when they cannot be read."""
    try:
        orientation: Any = image.getexif().get(Base.Orientation)
        return TURNS.get(orientation)
    except Exception:  # the pixels are whole, and what Pillow raises on broken metadata has no common kind
        return None


def rgb(image: Image.Image, *, bits: int = 8) -> Image.Image:
    """Brings a picture to eight-bit RGB: transparency over white, sixteen-bit greys scaled.

    Args:
        image: A loaded picture of any mode; it is left as it is, and returned when it is RGB already.
        bits: What a sample had in the file: PNG names a transparent colour by such samples, and Pillow scales what has
            fewer or more than eight to eight.

    Raises:
        DataError: Its pixels have no known range, or Pillow cannot make RGB of its mode.
    """
    if image.mode.startswith("I;16"):
        return _from_sixteen_bits(image)
    if image.mode in ("I", "F"):
        kind = "floating-point pixels" if image.mode == "F" else "pixels of 32 bits, or with a sign,"
        raise DataError(f"{kind} have no known range; save the picture with 8 or 16 bits")
    if image.mode == "La":  # of which Pillow makes nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        colours = _with_eight_bit_key(image, bits).convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _with_eight_bit_key(image: Image.Image, bits: int) -> Image.Image:
    """The picture with its transparent colour in the eight bits that Pillow has scaled its pixels to."""
    key: Any = image.info.get("transparency")
    if bits == 8 or image.mode not in ("L", "RGB") or not isinstance(key, int | tuple):
        return image
    samples = key if isinstance(key, tuple) else (key,)
    scaled = tuple(sample >> 8 if bits == 16 else sample * 255 // ((1 << bits) - 1) for sample in samples)
    image = image.copy()
    image.info["transparency"] = scaled if isinstance(key, tuple) else scaled[0]
    return image


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey that Pillow would clip, scaled to eight bits."""
    values = np.asarray(image).astype(np.int64)
    highest, white_is_zero = _grey_range(image)
    grey: NDArray[np.int64] = values.clip(max=highest) * 255 // highest
    if white_is_zero:
        grey = 255 - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, 255, grey)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _grey_range(image: Image.Image) -> tuple[int, bool]:
    """The highest value of a deep grey, and whether it is black. TIFF has greys of 12 bits, and negatives."""
    if not isinstance(image, TiffImageFile):
        return SIXTEEN_BITS, False
    bits = image.tag_v2.get(BITSPERSAMPLE, (16,))
    return (1 << int(bits[0])) - 1, image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
