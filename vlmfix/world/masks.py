"""Tells which pixels of a picture each object has, behind those that are drawn over it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlmfix.world.scenes import CANVAS, Placed, Scene
from vlmfix.world.sprites import sized

Mask = NDArray[np.bool_]


def visible(scene: Scene) -> list[Mask]:
    """Find the visible pixels of every object.

    A pixel is the last object's that is drawn there, also where that is faint, or half through at a sprite's edge.

    Args:
        scene: A scene.

    Returns:
        Of each object, in the order in which they are drawn, (512, 512) bool.
    """
    owner = np.full((CANVAS, CANVAS), -1, dtype=np.int16)
    for number, placed in enumerate(scene.objects):
        x0, y0, x1, y1 = placed.box
        owner[y0:y1, x0:x1][_opaque(placed)] = number
    return [owner == number for number in range(len(scene.objects))]


def runs(mask: Mask) -> dict[str, list[int]]:
    """Write a mask as COCO's plain runs: lengths, column after column, of pixels outside and inside in turn.

    Args:
        mask: (height, width) bool.
    """
    flat = mask.T.ravel()
    turns = np.flatnonzero(np.diff(flat)) + 1
    edges = [0, *([0] if flat[0] else []), *turns.tolist(), flat.size]  # the first run is of pixels outside
    return {"size": list(mask.shape), "counts": np.diff(edges).tolist()}


def _opaque(placed: Placed) -> Mask:
    """Where an object's sprite is drawn, in its box: (height, width) bool."""
    x0, y0, x1, y1 = placed.box
    left, top = placed.origin
    drawn = sized(placed.sprite, placed.size)[..., 3] > 0
    if placed.mirrored:
        drawn = drawn[:, ::-1]
    return drawn[y0 - top : y1 - top, x0 - left : x1 - left]
