"""Rectangles of cells: the shape of every picture that a vision tower cuts into patches or tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The box of a whole picture."""


def cells(rows: int, columns: int, *, within: Sequence[float] = WHOLE) -> Tensor:
    """Cuts a box into equal cells, row by row from the upper left.

    Args:
        rows: Number of cells from top to bottom.
        columns: Number of cells from left to right.
        within: x0, y0, x1, y1 of the box that is cut; the whole picture unless told.

    Returns:
        (rows * columns, 4) float32 boxes x0, y0, x1, y1.
    """
    left, top, right, bottom = within
    x = torch.linspace(left, right, columns + 1)
    y = torch.linspace(top, bottom, rows + 1)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = row.flatten(), column.flatten()  # (rows * columns,)
    return torch.stack([x[column], y[row], x[column + 1], y[row + 1]], dim=1)  # (rows * columns, 4)


def merged(values: Tensor, shape: tuple[int, int], size: int) -> Tensor:
    """Sums over squares of cells.

    Args:
        values: (n, rows * columns), one value per cell, row by row.
        shape: (rows, columns), multiples of ``size``.
        size: Cells along the edge of a square.

    Returns:
        (n, rows / size * columns / size), row by row.
    """
    rows, columns = shape
    squares = values.view(-1, rows // size, size, columns // size, size)
    return squares.sum(dim=(2, 4)).flatten(1)


def clipped(boxes: Tensor) -> Tensor:
    """Cuts off what lies outside the picture.

    Args:
        boxes: (n, 4) boxes that may reach over the picture's edge, where the processor padded it.

    Returns:
        (n, 4) float32 boxes in [0, 1]; a patch of padding alone is inf: still a patch, but without a place.
    """
    inside = boxes.clamp(0, 1)
    empty = (inside[:, 2] <= inside[:, 0]) | (inside[:, 3] <= inside[:, 1])  # (n,)
    return inside.float().masked_fill(empty[:, None], torch.inf)  # (n, 4)
