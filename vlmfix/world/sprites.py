"""The sprite sheet, and the one integer formula that brings a sprite to a drawn size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
SIZES = (26, 29, 32, 37, 42, 48, 56, 64, 74, 84, 96, 112, 128, 148, 170, 194, 220)  # longest side in pixels
OPAQUE = 48  # less alpha than this is not drawn, so a sprite's box is exact at every size

Picture = NDArray[np.uint8]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Sprite:
    """One cell of the sheet.

    Attributes:
        number: Position in the index, from 0.
        category: COCO name of what it shows.
        box: x0, y0, x1, y1 on the sheet, half-open.
        drawn: Width and height of its opaque pixels at each of `SIZES`.
    """

    number: int
    category: str
    box: tuple[int, int, int, int]
    drawn: tuple[tuple[int, int], ...]


@cache
def sprites() -> tuple[Sprite, ...]:
    """Read the index of the sheet."""
    cells = json.loads((ASSETS / "sprites.json").read_text(encoding="utf-8"))
    return tuple(
        Sprite(
            number=number,
            category=cell["category"],
            box=tuple(cell["box"]),
            drawn=tuple((width, height) for width, height in cell["drawn"]),
        )
        for number, cell in enumerate(cells)
    )


@cache
def sprites_of() -> Mapping[str, tuple[Sprite, ...]]:
    """Sprites by category name, in the order of the sheet."""
    groups: dict[str, tuple[Sprite, ...]] = {}
    for sprite in sprites():
        groups[sprite.category] = (*groups.get(sprite.category, ()), sprite)
    return groups


def pictures() -> list[Picture]:
    """Read the sheet's cells.

    Returns:
        One (height, width, 4) uint8 RGBA array per sprite, in the order of the index.
    """
    with Image.open(ASSETS / "sprites.png") as file:
        sheet = np.array(file.convert("RGBA"))
    return [sheet[y0:y1, x0:x1] for x0, y0, x1, y1 in (sprite.box for sprite in sprites())]


@cache
def sized(number: int, size: int) -> Picture:
    """Bring a sprite of the sheet to one of `SIZES`, by its position there: (height, width, 4) uint8, RGBA."""
    return resample(_sheet()[number], SIZES[size])


_sheet = cache(pictures)


def crop(picture: Picture) -> Picture:
    """Clear pixels under the opacity limit and cut to the rest.

    Args:
        picture: (height, width, 4) uint8 RGBA with at least one opaque pixel.

    Returns:
        The tight part, transparent pixels all zero.
    """
    kept = np.where(picture[..., 3:] >= OPAQUE, picture, 0).astype(np.uint8)
    rows = np.flatnonzero(kept[..., 3].any(axis=1))
    columns = np.flatnonzero(kept[..., 3].any(axis=0))
    return kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def resample(picture: Picture, size: int) -> Picture:
    """Bring a sprite to a size by exact area averages of premultiplied colours.

    Args:
        picture: (height, width, 4) uint8 RGBA.
        size: Longest side of the result in pixels, before the edges without opaque pixels are cut off.

    Returns:
        (height, width, 4) uint8 RGBA, tight around its opaque pixels.
    """
    height, width = picture.shape[:2]
    longest = max(height, width)
    values = picture.astype(np.int64)
    values[..., :3] *= values[..., 3:]  # colour times alpha
    values[..., 3] *= 255
    if size > longest:
        values = _double(_double(values).swapaxes(0, 1)).swapaxes(0, 1)
    rows, columns = (max(1, (2 * side * size + longest) // (2 * longest)) for side in (height, width))
    area = values.shape[0] * values.shape[1]
    sums = _area(_area(values, rows).swapaxes(0, 1), columns).swapaxes(0, 1)  # (rows, columns, 4)
    weight = np.maximum(sums[..., 3:], 1)
    colour = (sums[..., :3] * 510 + weight) // (2 * weight)
    scale = area * 255 * (16 if size > longest else 1)
    alpha = (2 * sums[..., 3:] + scale) // (2 * scale)
    return crop(np.concatenate([colour.clip(max=255), alpha.clip(max=255)], axis=2).astype(np.uint8))


def _double(values: Integers) -> Integers:
    """Twice as many rows by linear interpolation, times 4. (S, ...) to (2 S, ...)."""
    before = np.concatenate([values[:1], values[:-1]])
    after = np.concatenate([values[1:], values[-1:]])
    pairs = np.stack([3 * values + before, 3 * values + after], axis=1)  # (S, 2, ...)
    return pairs.reshape(-1, *values.shape[1:])


def _area(values: Integers, count: int) -> Integers:
    """Integrals over `count` equal parts of the rows, times `count`. (S, ...) to (count, ...)."""
    length = len(values)
    edges = np.arange(count + 1) * length
    whole, rest = edges // count, edges % count
    sums = np.concatenate([np.zeros_like(values[:1]), values.cumsum(axis=0)])  # (S + 1, ...)
    padded = np.concatenate([values, np.zeros_like(values[:1])])
    rest = rest.reshape(-1, *(1,) * (values.ndim - 1))
    integral = sums[whole] * count + padded[whole] * rest  # (count + 1, ...)
    return np.asarray(np.diff(integral, axis=0))
