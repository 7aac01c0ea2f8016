"""Any-resolution tiling of LLaVA-NeXT and LLaVA-OneVision: square tiles, put together as one large grid."""

from __future__ import annotations

from math import ceil, sqrt

import torch
from torch import Tensor

from vlmfix.models.grid import clipped
from vlmfix.upstream.geometry import best_canvas


def anyres(
    size: tuple[int, int], *, canvases: list[list[int]], tile: int, patch: int, most: int | None = None
) -> Tensor:
    """Boxes of the tokens of all tiles: whole lines from edge to edge, each with a newline token at its end.

    The picture is resized into the best of the allowed canvases, padded to it and cut into tiles, and the
    tiles into patches. Their features are put together again, and the lines or columns that are padding are
    taken off.

    Args:
        size: (height, width) of the picture in pixels.
        canvases: Allowed (height, width) of the canvas, multiples of ``tile``.
        tile: Edge of a tile in pixels.
        patch: Edge of a patch in pixels; what a tile has beyond whole patches is not seen.
        most: More than so many tiles' worth of features are resized to fewer; None leaves them all.

    Returns:
        (lines * (columns + 1), 4) float32; the last of every line is NaN.
    """
    canvas = best_canvas(size, canvases)
    fitted = _fitted(size, canvas)
    lines = _patches(canvas[0], fitted[0], tile, patch)
    columns = _patches(canvas[1], fitted[1], tile, patch)
    if size[1] / size[0] > len(columns) / len(lines):
        lines = _unpadded(lines, size[0] * (len(columns) / size[1]))
    else:
        columns = _unpadded(columns, size[1] * (len(lines) / size[0]))
    ratio = 1.0 if most is None else sqrt(len(lines) * len(columns) / (most * (tile // patch) ** 2))
    if ratio > 1.1:  # the models' own threshold: a little too many are left alone
        lines = _resized(lines, int(len(lines) // ratio))
        columns = _resized(columns, int(len(columns) // ratio))
    return _with_newlines(lines, columns)


def _fitted(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture when it fills the canvas as far as its shape allows."""
    height, width = size
    down, across = canvas[0] / height, canvas[1] / width
    if across < down:
        return min(ceil(height * across), canvas[0]), canvas[1]
    return canvas[0], min(ceil(width * down), canvas[1])


def _patches(canvas: int, fitted: int, tile: int, patch: int) -> Tensor:
    """(n, 2) float64: where each patch along one axis of the canvas lies, in fractions of the picture."""
    tiles = torch.arange(0, canvas, tile, dtype=torch.float64)
    starts = (tiles[:, None] + torch.arange(tile // patch) * patch).flatten()  # (n,)
    border = (canvas - fitted) // 2
    return (torch.stack([starts, starts + patch], dim=1) - border) / fitted  # (n, 2)


def _unpadded(spans: Tensor, kept: float) -> Tensor:
    """The spans without as many at either end as half of what padding added to ``kept``."""
    padding = (len(spans) - int(round(kept, 7))) // 2
    return spans[padding : len(spans) - padding]


def _resized(spans: Tensor, count: int) -> Tensor:
    """(count, 2) spans of as many equal parts of a row of features."""
    ends = torch.arange(count + 1) * len(spans)
    first = ends[:-1] // count
    last = (ends[1:] - 1) // count
    length = spans[0, 1] - spans[0, 0]
    start = spans[first, 0] + (ends[:-1] - first * count) / count * length
    end = spans[last, 0] + (ends[1:] - last * count) / count * length
    return torch.stack([start, end], dim=1)  # (count, 2)


def _with_newlines(lines: Tensor, columns: Tensor) -> Tensor:
    """(R * (C + 1), 4) boxes of a grid of (R, 2) lines and (C, 2) columns, NaN at the end of every line."""
    down = lines[:, None].expand(-1, len(columns), -1)  # (R, C, 2)
    across = columns[None].expand(len(lines), -1, -1)  # (R, C, 2)
    boxes = torch.stack([across[..., 0], down[..., 0], across[..., 1], down[..., 1]], dim=-1)  # (R, C, 4)
    boxes = clipped(boxes.reshape(-1, 4)).reshape(*boxes.shape)  # (R, C, 4)
    return torch.nn.functional.pad(boxes, (0, 0, 0, 1), value=torch.nan).reshape(-1, 4)  # (R * (C + 1), 4)
