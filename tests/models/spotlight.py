"""Which tokens see a coloured cell: the geometry of a family, measured on the model instead of computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.upstream.names import TextNames

GROUND, PAINT = (110, 110, 110), (255, 40, 0)
BLOCKS = ("layers", "layer", "blocks")
"""Names that vision towers give to the list of their layers."""


def plain(width: int, height: int) -> Image.Image:
    """A picture without anything in it."""
    return Image.new("RGB", (width, height), GROUND)


def painted(width: int, height: int, box: Sequence[float]) -> Image.Image:
    """The plain picture with one coloured cell at x0, y0, x1, y1 in [0, 1]; at least one pixel."""
    picture = plain(width, height)
    x0, y0 = round(box[0] * width), round(box[1] * height)
    x1, y1 = max(x0, round(box[2] * width) - 1), max(y0, round(box[3] * height) - 1)
    ImageDraw.Draw(picture).rectangle((x0, y0, x1, y1), fill=PAINT)
    return picture


def embeddings(vlm: Checkpoint, batch: Batch) -> Tensor:
    """(B, T, hidden) what the decoder gets, with a vision tower that mixes no patches."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs[TextNames.of(module).embeds])

    hook = vlm.family.decoder(vlm.model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with local_vision(vlm), torch.no_grad():
            vlm.model(**batch)
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def local_vision(vlm: Checkpoint) -> Iterator[None]:
    """Every vision layer adds nothing, so that a feature depends on its own patch alone."""
    decoder = {id(module) for module in vlm.family.decoder(vlm.model).modules()}
    layers = [
        module
        for name, module in vlm.model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in BLOCKS and id(module) not in decoder
    ]
    weights = [weight for module in layers for weight in module.parameters()]
    if not weights:
        raise LookupError("found no vision layers")
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
