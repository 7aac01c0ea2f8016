"""Finds the part of a picture that CARVE shows, from a map over it: threshold, regions, mask, box, enlargement."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmfix.decoders.picture.refined import Array

Mask = NDArray[np.bool_]
PixelBox = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x1 and y1 are excluded."""
Ranking = Literal["attention", "size", "remove-small"]
Rule = Literal["at-most", "at-least"]

LARGEST_SIDE = 4096
"""Pixels along the longer side of an enlarged part, unless the picture itself is longer."""
SMALLEST_SHARE = 0.001
"""Share of the pixels above the threshold below which ``remove-small`` removes a region."""
SLACK = 1e-12
"""Slack of the threshold, so that a map that is flat but for rounding passes everywhere."""


def threshold(values: Array, share: float) -> Mask:
    """Marks the largest values of a map, (height, width) bool.

    Args:
        values: (height, width) map.
        share: Share of the pixels to keep, in (0, 1]; ties at the threshold are all kept.
    """
    level = float(np.percentile(values, 100 * (1 - share)))
    return np.asarray(values >= level - SLACK * abs(level))


def best_regions(values: Array, kept: Mask, *, count: int, rule: Rule, ranking: Ranking, share: float) -> Mask:
    """Selects the connected regions that rank highest; pixels that touch only at a corner are not connected.

    Args:
        values: (height, width) map.
        kept: (height, width), pixels above the threshold.
        count: K.
        rule: ``at-most`` K regions, or ``at-least`` K: then ``share`` of all regions, when that is more.
        ranking: By the sum of the map over a region (``attention``) or by its area (``size``); ``remove-small`` ranks
            nothing and keeps all but specks.
        share: Share of the pixels that the threshold kept, in (0, 1].
    """
    number, labels = cv2.connectedComponents(kept.astype(np.uint8), connectivity=4)
    areas = np.bincount(labels.ravel(), minlength=number)[1:]  # label 0 is the rest of the picture
    if ranking == "remove-small":
        chosen = areas >= int(kept.sum() * SMALLEST_SHARE)
    else:
        sums = np.bincount(labels.ravel(), weights=values.ravel(), minlength=number)[1:]
        scores = sums if ranking == "attention" else areas
        limit = count if rule == "at-most" else max(count, int(len(areas) * share))
        chosen = np.zeros(len(areas), dtype=bool)
        chosen[np.argsort(-scores, kind="stable")[:limit]] = True
    return np.asarray(np.concatenate([[False], chosen])[labels], dtype=np.bool_)


def bounding_box(mask: Mask) -> PixelBox:
    """Finds the smallest box around all pixels of a mask that is not empty."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return x, y, x + width, y + height


def grown(box: PixelBox, width: int, height: int, *, smallest: int, aspect: float) -> PixelBox:
    """Enlarges a box around its middle, as far as the picture allows.

    Args:
        box: The box.
        width: Pixels of the picture.
        height: Pixels of the picture.
        smallest: Fewest pixels along either side.
        aspect: Longest side over shortest, at most.
    """
    x0, y0, x1, y1 = box
    least = max(smallest, int(np.ceil(max(x1 - x0, y1 - y0) / aspect)))
    x0, x1 = _widened(x0, x1, least, width)
    y0, y1 = _widened(y0, y1, least, height)
    return x0, y0, x1, y1


def _widened(start: int, end: int, least: int, length: int) -> tuple[int, int]:
    missing = min(least, length) - (end - start)
    if missing <= 0:
        return start, end
    start = min(max(0, start - missing // 2), length - (end - start + missing))
    return start, start + min(least, length)


def carved(picture: Image.Image, mask: Mask, box: PixelBox) -> Image.Image:
    """Cuts out a box, blackens it outside the mask, and enlarges it to cover the picture's size in the same shape.

    Args:
        picture: RGB.
        mask: (height, width), pixels to show.
        box: The part to cut out.
    """
    x0, y0, x1, y1 = box
    shown = np.where(mask[y0:y1, x0:x1, None], np.asarray(picture)[y0:y1, x0:x1], 0).astype(np.uint8)
    return enlarged(Image.fromarray(shown), picture.size)


def enlarged(part: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes a part of a picture until it covers (width, height), but no longer than ``LARGEST_SIDE``."""
    scale = max(size[0] / part.width, size[1] / part.height)
    scale = min(scale, max(LARGEST_SIDE, *size) / max(part.size))
    target = (max(1, int(part.width * scale)), max(1, int(part.height * scale)))
    return part.resize(target, Image.Resampling.LANCZOS)
