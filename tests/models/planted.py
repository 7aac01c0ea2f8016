"""Finds by experiment which image tokens show a spot of a picture: paint it, see which features change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch

GREY, RED = (120, 120, 120), (250, 20, 20)

BLOCKS = {
    "qwen2_vl": "visual.blocks",
    "qwen2_5_vl": "visual.blocks",
    "qwen3_vl": "visual.blocks",
    "internvl": "vision_tower.encoder.layer",
    "idefics3": "vision_model.encoder.layers",
    "smolvlm": "vision_model.encoder.layers",
}
"""Where each vision tower has its transformer blocks."""


def plain(size: tuple[int, int]) -> Image.Image:
    """A grey picture of (width, height) pixels."""
    return Image.new("RGB", size, GREY)


def planted(size: tuple[int, int], box: Sequence[float]) -> Image.Image:
    """A grey picture of (width, height) pixels with a box in [0, 1] painted red."""
    picture = plain(size)
    x0, y0, x1, y1 = (round(edge * length) for edge, length in zip(box, (*size, *size), strict=True))
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill=RED)
    return picture


@contextmanager
def without_mixing(vlm: Checkpoint) -> Iterator[None]:
    """Takes the blocks out of the vision tower, so that no patch knows of another."""
    parent, _, name = BLOCKS[vlm.model.config.model_type].rpartition(".")
    tower = vlm.model.model.get_submodule(parent)
    blocks = getattr(tower, name)
    setattr(tower, name, nn.ModuleList())
    try:
        yield
    finally:
        setattr(tower, name, blocks)


def features(vlm: Checkpoint, batch: Batch) -> Tensor:
    """(image tokens of all rows, D): what the tower gives each image token, in the order of the prompts."""
    encode = vlm.model.model.get_image_features
    arguments = {key: batch[key] for key in signature(encode).parameters if key in batch}
    with torch.no_grad():
        found = encode(**arguments, return_dict=True).pooler_output
    found = found if isinstance(found, Tensor) else torch.cat(list(found))
    return found.reshape(-1, found.shape[-1])


def responses(vlm: Checkpoint, size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> Tensor:
    """(spots, tokens): how much each image token of a picture changes when each of the boxes is painted."""
    pictures = [[plain(size)], *([planted(size, box)] for box in boxes)]
    with without_mixing(vlm):
        found = features(vlm, vlm.encode([""] * len(pictures), pictures))
    found = found.reshape(len(pictures), -1, found.shape[-1])  # (1 + spots, tokens, D)
    return (found[1:] - found[:1]).abs().mean(dim=-1)


def around(boxes: Tensor, box: Sequence[float]) -> Tensor:
    """(n,) bool: which boxes hold the centre of a box."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
