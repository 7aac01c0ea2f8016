"""Tells pictures that this world drew from others, by what it writes into them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vlmfix.world.scenes import CANVAS

KEY, VALUE = "Software", "vlmfix world"
MOST_COLOURS = 32_000
"""Of a drawn picture; of 200 the richest has 16,819. Photographs of this size have more, unless they are plain."""


def signature() -> PngInfo:
    """Returns the text that a drawn picture carries."""
    text = PngInfo()
    text.add_text(KEY, VALUE)
    return text


def is_drawn(path: Path) -> bool:
    """Says whether this world drew a picture, as far as its file tells.

    Pictures of earlier versions carry no text: a PNG of the world's size with few colours is taken for one. So a
    diagram of that size is, too.

    Args:
        path: A file.

    Raises:
        OSError: The file is no picture, or cannot be read.
    """
    with Image.open(path) as picture:
        if picture.format != "PNG" or picture.size != (CANVAS, CANVAS):
            return False
        return picture.info.get(KEY) == VALUE or picture.getcolors(MOST_COLOURS) is not None
