"""Turns gradients of pixels into maps over the picture that the pixels were made from.

Shape letters: here n pixel arrays, R pixels along an edge of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from vlmfix.decoders.picture.refined import Array, Box
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

REARRANGED = frozenset({"llava_next", "llava_onevision"})
"""Model types whose tiles are padded, put together and cut anew behind the vision tower."""
SIGMA = 0.8
"""Standard deviation of the blur that the edges are taken against, in pixels; its kernel has 3 x 3."""


def no_pixel_places(vlm: Checkpoint) -> str | None:
    """Says why pixels of the model's input have no known place in the picture; None when they have."""
    if vlm.model.config.model_type in REARRANGED:
        return f"{vlm.family.title} puts its tiles together anew: pixels have no place of their own"
    return None


@dataclass(frozen=True, eq=False)
class View:
    """Describes one array of pixels that the vision tower gets, and the part of the picture that it shows.

    Attributes:
        image: Number of the picture within its row.
        strength: (height, width) channel norm of the gradient.
        columns: The prompt columns of its tokens, in order.
        grid: (lines, columns) of its tokens.
        box: The part of the picture that the tokens cover.
    """

    image: int
    strength: Array
    columns: Tensor
    grid: tuple[int, int]
    box: Box

    def cells(self) -> tuple[int, int]:
        """Returns the (height, width) in pixels that whole cells cover."""
        high, wide = self.strength.shape
        return high // self.grid[0] * self.grid[0], wide // self.grid[1] * self.grid[1]


def views(vlm: Checkpoint, batch: Batch, gradient: Tensor) -> list[View]:
    """Splits the gradient of one row's pixels into the row's views.

    Args:
        vlm: The model.
        batch: A single row with pictures.
        gradient: Of the shape of the batch's ``pixel_values``.

    Raises:
        IncompatibleDecodersError: Pixels and tokens cannot be matched in this family.
    """
    reason = no_pixel_places(vlm)
    if reason is not None:
        raise IncompatibleDecodersError(f"pure-grad: {reason}", "use method=rel-att or grad-att")
    layout = vlm.layout(batch)
    columns = layout.tokens[0].nonzero().squeeze(1).cpu()  # (tokens,)
    if "image_grid_thw" in batch:
        merge = int(vlm.model.config.vision_config.spatial_merge_size)
        sizes = [tuple(size) for size in batch["image_grid_thw"][:, 1:].tolist()]
        strengths = _unmerged(gradient, sizes, merge, int(vlm.model.config.vision_config.patch_size))
        counts = [lines * wide // merge**2 for lines, wide in sizes]
        grids = [(lines // merge, wide // merge) for lines, wide in sizes]
    else:
        tiles = gradient.flatten(0, -4)  # (n, channels, R, R)
        full = batch["pixel_values"].flatten(0, -4)
        real = [n for n in range(len(tiles)) if bool((full[n] != 0).any())]  # the others only pad the batch
        strengths = [_norm(tiles[n]) for n in real]
        side = math.isqrt(len(columns) // len(real))
        counts, grids = [side**2] * len(real), [(side, side)] * len(real)
    if sum(counts) != len(columns):
        raise IncompatibleDecodersError(
            f"pure-grad: {len(strengths)} views do not share {len(columns)} tokens evenly",
            "use method=rel-att or grad-att",
        )
    parts = zip(strengths, columns.split(counts), grids, strict=True)
    return [_view(layout, *part) for part in parts]


def _view(layout: ImageLayout, strength: Array, columns: Tensor, grid: tuple[int, int]) -> View:
    boxes = layout.boxes[0].cpu()[columns]
    low, high = boxes[:, :2].amin(dim=0).tolist(), boxes[:, 2:].amax(dim=0).tolist()
    return View(int(layout.image[0, columns[0]]), strength, columns, grid, (low[0], low[1], high[0], high[1]))


def _norm(gradient: Tensor) -> Array:
    """Computes the norm over channels, (channels, height, width) -> (height, width)."""
    return np.asarray(torch.linalg.vector_norm(gradient.double(), dim=0).numpy())


def _unmerged(gradient: Tensor, sizes: list[tuple[int, int]], merge: int, patch: int) -> list[Array]:
    """Rearranges the gradients of flat patches, squares of ``merge`` x ``merge`` in order, into pictures.

    Args:
        gradient: (patches, channels * frames * patch * patch) of all pictures.
        sizes: (lines, columns) of every picture, in patches.
        merge: Patches along the edge of a token.
        patch: Pixels along the edge of a patch.
    """
    found = []
    for (lines, columns), own in zip(sizes, gradient.split([a * b for a, b in sizes]), strict=True):
        # 3 channels of as many frames as there are; a picture is the same frame several times
        shape = (lines // merge, columns // merge, merge, merge, 3, -1, patch, patch)
        order = own.view(shape).permute(4, 5, 0, 2, 6, 1, 3, 7)  # (3, frames, lines/m, m, p, columns/m, m, p)
        found.append(_norm(order.reshape(3, -1, lines * patch, columns * patch).sum(dim=1)))
    return found


def edges(picture: Image.Image, height: int, width: int, median: int) -> Array:
    """Marks where a picture has texture.

    It takes the picture's pixels at (height, width), minus their blur; the norm over channels; the median over a
    square of ``median`` pixels; and is 1 where that exceeds its own median over the picture.

    Args:
        picture: RGB.
        height: Pixels of the result.
        width: Pixels of the result.
        median: Side of the median filter, odd.

    Returns:
        (height, width) of 0 and 1.
    """
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    blurred = cv2.GaussianBlur(pixels, (3, 3), SIGMA, borderType=cv2.BORDER_REFLECT_101)
    strength = ndimage.median_filter(np.linalg.norm(pixels - blurred, axis=2), size=median, mode="reflect")
    return np.asarray(strength > np.median(strength), dtype=np.float64)


def edge_gradients(view: View, picture: Image.Image, median: int, general: Array | None) -> Tensor:
    """Averages the gradient on a view's edges, one mean per token.

    Args:
        view: The view.
        picture: The whole original picture.
        median: Side of the median filter of the edges.
        general: (height, width) strength of the same view under the general instruction, to divide by; or None.

    Returns:
        (tokens,) float64; not finite where it was divided by zero.
    """
    high, wide = view.cells()
    x0, y0, x1, y1 = view.box
    part = picture.crop(
        (round(x0 * picture.width), round(y0 * picture.height), round(x1 * picture.width), round(y1 * picture.height))
    )
    strength = view.strength
    if general is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            strength = strength / general
    marked = edges(part, high, wide, median)
    kept = np.where(marked > 0, strength[:high, :wide], 0.0)
    lines, columns = view.grid
    return torch.from_numpy(kept.reshape(lines, high // lines, columns, wide // columns).mean(axis=(1, 3)).flatten())
