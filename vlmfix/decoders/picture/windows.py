"""Finds the window of a picture that ViCrop cuts out, from a map over it, and cuts large pictures into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from vlmfix.decoders.picture.refined import Array

RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Sides of the windows, in base sides."""
FLAT = 1e-9
"""A map whose values differ by less than this share of the largest is flat."""


@dataclass(frozen=True)
class Window:
    """Describes a window of a picture.

    Attributes:
        box: x0, y0, x1, y1 in pixels; x1 and y1 are excluded.
        peaked: False when the map is flat: the first window is taken then.
    """

    box: tuple[int, int, int, int]
    peaked: bool = True


def best_window(values: Array, width: int, height: int, base: int, *, by_area: bool) -> Window:
    """Finds the square window whose content stands out most from its four neighbours.

    For each ratio r the window of r * base pixels, in whole cells, is put where the map's sum in it is largest. Its
    sharpness is that sum minus the mean of the windows one cell further up, down, left and right. The sharpest window
    wins; r = 1 wins when the picture is no larger than it, and then the whole picture is the window.

    Args:
        values: (lines, columns) map, finite.
        width: Pixels that the map covers.
        height: Pixels that the map covers.
        base: Smallest side in pixels.
        by_area: Divides the sharpness by the window's number of cells.
    """
    lines, columns = values.shape
    across, down = width / columns, height / lines  # pixels of a cell
    found: list[tuple[float, float, tuple[int, int, int, int]]] = []
    for ratio in RATIOS:
        wide = min(max(1, int(base * ratio / across)), columns)
        high = min(max(1, int(base * ratio / down)), lines)
        if (wide, high) == (columns, lines):
            if ratio == RATIOS[0]:
                return Window((0, 0, width, height))
            continue
        x, y, sharpness = _sharpest(values, wide, high)
        found.append((sharpness / (wide * high) if by_area else sharpness, ratio, (x, y, wide, high)))
    _, ratio, (x, y, wide, high) = max(found, key=lambda one: one[0])  # the first of equals
    middle = (int(x * across + across * wide / 2), int(y * down + down * high / 2))
    half = int(base * ratio // 2)
    (x0, x1), (y0, y1) = (_around(at, half, length) for at, length in zip(middle, (width, height), strict=True))
    return Window((x0, y0, x1, y1), peaked=bool(np.ptp(values) > FLAT * np.abs(values).max()))


def _sharpest(values: Array, wide: int, high: int) -> tuple[int, int, float]:
    """Finds the largest window, the first one column by column, and how far it exceeds its neighbours' mean."""
    lines, columns = (length - own + 1 for length, own in zip(values.shape, (high, wide), strict=True))
    # One sum per window: running sums round differently, which would break ties between equal windows.
    sums = np.array([[values[y : y + high, x : x + wide].sum() for x in range(columns)] for y in range(lines)])
    x, y = divmod(int(sums.T.argmax()), sums.shape[0])
    near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    around = [sums[at] for at in near if 0 <= at[0] < sums.shape[0] and 0 <= at[1] < sums.shape[1]]
    return x, y, float(sums[y, x] - np.mean(around))


def attention_ratio(values: Array, box: tuple[int, int, int, int]) -> float:
    """Computes how much more of a map lies in a box than in an average box of its size: 1 for a flat map.

    Args:
        values: (lines, columns) map, not negative.
        box: x0, y0, x1, y1 in cells; x1 and y1 are excluded.
    """
    x0, y0, x1, y1 = box
    sums = sliding_window_view(values, (y1 - y0, x1 - x0)).sum(axis=(2, 3))
    return float(sums[y0, x0] / sums.mean())


def _around(middle: int, half: int, length: int) -> tuple[int, int]:
    middle = min(max(middle, half), length - half)
    return max(0, middle - half), min(length, middle + half)


def block_grid(width: int, height: int, side: int, *, covering: bool) -> tuple[int, int]:
    """Computes the (rows, columns) of the blocks that a large picture is cut into.

    Args:
        width: Pixels of the picture.
        height: Pixels of the picture.
        side: Largest side of a block in pixels.
        covering: Cuts either side on its own, so that no block exceeds ``side``; otherwise the number of columns
            follows from the rows and the picture's shape.
    """
    rows = ceil(height / side)
    return rows, max(1, ceil(width / side) if covering else int(rows * width / height))


def blocks(picture: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
    """Cuts out the blocks row by row, all of one size; the last may stick out, black, by fewer pixels than blocks.

    Args:
        picture: RGB.
        grid: (rows, columns).
    """
    rows, columns = grid
    wide, high = ceil(picture.width / columns), ceil(picture.height / rows)
    starts = [(column * wide, row * high) for row in range(rows) for column in range(columns)]
    return [picture.crop((x, y, x + wide, y + high)) for x, y in starts]


def mosaic(parts: list[Array], grid: tuple[int, int]) -> Array:
    """Joins the maps of all blocks, row by row, into one without changing values."""
    rows, columns = grid
    return np.concatenate([np.concatenate(parts[row * columns : (row + 1) * columns], axis=1) for row in range(rows)])
