"""A LLaVA that looks at the brightest patch when the question holds a mark, and everywhere alike when it does not."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import nn

from tests.heads.planted import HEADS, look, planted_vlm

BRIGHT, MARK, READ = 50, 51, 52
"""Dimensions: brightness of a patch, 1 at the mark's token, 1 at tokens that have seen the mark."""
QUESTION = "where is z?"
BRIGHT_AT = (3, 1)
"""Line and column, of 5 x 5, of the patch that ``scene`` paints."""


class Brightness(nn.Module):
    """Stands for the projector: marks the patches that are bright in what the vision tower was given."""

    def __init__(self, vlm):
        super().__init__()
        self.inner = vlm.model.model.multi_modal_projector
        self.pixels = []
        vlm.model.model.vision_tower.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, kwargs):
        self.pixels.append(args[0] if args else kwargs["pixel_values"])

    def forward(self, features):
        found = self.inner(features).clone()
        light = nn.functional.avg_pool2d(self.pixels.pop().mean(dim=1, keepdim=True), 8).flatten(1)  # (n, 25)
        found[..., BRIGHT] = (light > 1.0).to(found.dtype)
        return found


def bright_vlm():
    vlm = planted_vlm(tokens=[("z", MARK, 1.0)])
    vlm.model.model.multi_modal_projector = Brightness(vlm)
    first = vlm.family.attention_modules(vlm.model)[0]
    look(vlm, 0, 0, MARK)
    with torch.no_grad():
        first.v_proj.weight[0] = 0.0
        first.v_proj.weight[0, MARK] = 1.0
        first.o_proj.weight[READ] = 0.0
        first.o_proj.weight[READ, 0] = 1.0
    for head in range(HEADS):
        look(vlm, 1, head, BRIGHT, when=READ)
    return vlm


def scene(size):
    """A dark picture with one bright patch of the middle square, and the patch's box in [0, 1]."""
    width, height = size
    side = min(size)
    left, top, cell = (width - side) // 2, (height - side) // 2, side // 5
    line, column = BRIGHT_AT
    x, y = left + column * cell, top + line * cell
    picture = Image.new("RGB", size, (40, 40, 40))
    ImageDraw.Draw(picture).rectangle((x, y, x + cell - 1, y + cell - 1), fill=(255, 255, 255))
    return picture, (x / width, y / height, (x + cell) / width, (y + cell) / height)
