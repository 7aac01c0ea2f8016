"""Holds the pictures and maps that refining decoders make, and a memo of results that depend on pictures alone.

Shape letters (``docs/notation.md``): T prompt tokens; here also N image-patch tokens of a picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmfix.models.layout import ImageLayout

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in [0, 1] of a picture."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
MOST_CELLS = 256
"""Most cells along an edge of a map that is painted from tokens' boxes."""


@dataclass(frozen=True, eq=False)
class PictureMap:
    """Holds one number for each cell of a regular grid over a picture, or over the part of it that the model saw.

    Attributes:
        values: (lines, columns) float64.
        box: The part of the picture that the grid covers.
    """

    values: Array
    box: Box = WHOLE

    def pixels(self, height: int, width: int) -> Array:
        """Resizes the map to the picture: bilinear between the centres of the cells, flat beyond the outermost ones.

        Returns:
            (height, width) float64; zero outside ``box``.
        """
        x0, y0, x1, y1 = pixel_box(self.box, width, height)
        whole = np.zeros((height, width))
        whole[y0:y1, x0:x1] = cv2.resize(self.values, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        return whole

    def over_whole(self) -> Array:
        """Extends the map to the whole picture, with cells about as large; zero where the model saw nothing."""
        if self.box == WHOLE:
            return self.values
        lines, columns = self.values.shape
        x0, y0, x1, y1 = self.box
        return self.pixels(max(1, round(lines / (y1 - y0))), max(1, round(columns / (x1 - x0))))


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Converts a box to pixels of a picture, at least one pixel wide and high."""
    x0, y0 = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    return x0, y0, max(round(box[2] * width), x0 + 1), max(round(box[3] * height), y0 + 1)


def token_map(layout: ImageLayout, values: Tensor, *, row: int, image: int) -> PictureMap:
    """Makes a map of a picture from one value per token, placed where the token looks.

    Where the picture's tokens form one rectangle, they are the cells of the map. Where they do not, as with tiles
    beside a view of the whole, the map covers the picture with cells as large as the smallest token's place, and each
    cell holds the mean of the tokens that show it (zero where none does).

    Args:
        layout: Where image tokens look.
        values: (T,) one value per prompt token; only those of the picture's patches are read.
        row: Row of the batch.
        image: Number of the picture within the row.

    Raises:
        LayoutError: The row has no such picture, or its tokens have no place in it.
    """
    grid = layout.grid(row, image)
    values = values.to(layout.boxes.device)
    mine = layout.image[row] == image
    boxes = layout.boxes[row][mine].cpu()
    if grid is not None:
        order = np.lexsort((boxes[:, 0].numpy(), boxes[:, 1].numpy()))  # line by line
        own = values[mine].double().cpu().numpy()[order].reshape(grid)  # (lines, columns)
        low, high = boxes[:, :2].amin(dim=0).tolist(), boxes[:, 2:].amax(dim=0).tolist()
        return PictureMap(own, (low[0], low[1], high[0], high[1]))
    placed = boxes[boxes.isfinite().all(dim=1)]
    columns, lines = 1, 1
    if len(placed):
        smallest = (placed[:, 2:] - placed[:, :2]).clamp(min=1 / MOST_CELLS).amin(dim=0)
        columns, lines = (1 / smallest).round().long().tolist()
    return PictureMap(layout.heatmap(values, row=row, image=image, size=(lines, columns)).double().numpy())


@dataclass(frozen=True, eq=False)
class Look:
    """Holds the part that was chosen of one picture, and the map that it was chosen by.

    Attributes:
        picture: The new picture.
        box: The part of the original picture that it shows.
        map: The map that the part was chosen by; None when there was nothing to choose.
        problem: Why the choice means nothing, in one sentence; empty when there is no problem.
    """

    picture: Image.Image
    box: Box
    map: PictureMap | None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Refined:
    """Holds the refined pictures of one question.

    Attributes:
        pictures: The pictures that the model is shown, in order.
        looks: One for each original picture; empty where nothing was refined.
    """

    pictures: tuple[Image.Image, ...]
    looks: tuple[Look, ...] = ()


@dataclass(eq=False)
class PictureMemo:
    """Keeps results that depend on pictures alone, for further questions about them; drops the oldest entries first.

    It belongs to one model in one state of its weights.

    Attributes:
        room: Most entries.
        weights: State of the weights that the entries were computed with.
    """

    room: int = 64
    weights: Hashable = None
    _entries: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, repr=False)

    def recall(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        """Returns the values of all keys, and computes all missing ones together.

        Args:
            keys: One for each row; equal keys have equal values.
            compute: Given the first position of every missing key, returns their values.
        """
        missing = [place for place, key in enumerate(keys) if key not in self._entries and keys.index(key) == place]
        fresh = dict(zip((keys[place] for place in missing), compute(missing) if missing else (), strict=True))
        found = [fresh[key] if key in fresh else self._entries[key] for key in keys]
        for key, value in zip(keys, found, strict=True):
            self._entries[key] = value
            self._entries.move_to_end(key)
        while len(self._entries) > self.room:
            self._entries.popitem(last=False)
        return found

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()

    def of(self, weights: Hashable) -> PictureMemo:
        """Returns this memo, after dropping entries that were computed with other weights."""
        if weights != self.weights:
            self.clear()
            self.weights = weights
        return self


def clean(values: Array) -> tuple[Array, bool]:
    """Replaces values that are not finite: NaN by 0, an infinity by the largest or smallest finite value.

    Returns:
        (the values, whether any was replaced).
    """
    finite = np.isfinite(values)
    if finite.all():
        return values, False
    known = values[finite]
    high, low = (float(known.max()), float(known.min())) if len(known) else (0.0, 0.0)
    return np.nan_to_num(values, nan=0.0, posinf=high, neginf=low), True


def places(tokens: Tensor, values: Tensor) -> Tensor:
    """Spreads image tokens' values over all prompt tokens.

    Args:
        tokens: (T,) bool, N of them True.
        values: (N,).

    Returns:
        (T,) float64 on the CPU, zero elsewhere.
    """
    whole = torch.zeros(len(tokens), dtype=torch.float64)
    whole[tokens.cpu()] = values.double().cpu()
    return whole
