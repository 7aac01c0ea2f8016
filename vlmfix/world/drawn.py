"""Tells pictures that this world drew from others, by their form."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmfix.world.scenes import CANVAS

MOST_COLOURS = 32_000
"""Of a drawn picture; of 200 the richest has 16,819. Photographs of this size have more, unless they are plain."""


def is_drawn(path: Path) -> bool:
    """Says whether this world drew a picture, as far as its file tells.

    A PNG of the world's size with few colours is taken for one, so a diagram of that size is, too. Nothing is written
    into pictures to tell them by: their bytes are part of what an evaluation is repeated with.

    Args:
        path: A file.

    Raises:
        OSError: The file is no picture, or cannot be read.
    """
    with Image.open(path) as picture:
        if picture.format != "PNG" or picture.size != (CANVAS, CANVAS):
            return False
        return picture.getcolors(MOST_COLOURS) is not None
