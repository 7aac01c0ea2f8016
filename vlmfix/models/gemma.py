"""Gemma 3: the picture in one square, with pan-and-scan also a few crops of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, isqrt

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.models.family import Family
from vlmfix.models.grid import cells, merged
from vlmfix.models.layout import Batch

CROPS = "and here are some crops"
"""What the processor writes between a picture and its crops."""


class Gemma(Family):
    """Gemma 3: the picture is stretched to a square, and its patches pooled to 16 x 16 tokens.

    With pan-and-scan, an option of the processor, a long picture comes whole and then in equal crops along
    its longer side, with a sentence between that announces them. Whether it was on cannot be seen from the
    processor's settings, as it may be asked for in the call; the prompt tells. How large the crops are
    follows from the picture's size: where that is unknown they have no place.
    """

    title = "Gemma 3"
    model_types = frozenset({"gemma3"})
    apart = True

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Boxes of the whole picture, then of its crops; see ``Family.patches``."""
        tokens = model.config.mm_tokens_per_image
        marked = batch["input_ids"] == self.image_token(model.config)  # (B, T)
        places = []
        for row, ids in enumerate(batch["input_ids"]):
            where = marked[row].nonzero().squeeze(1).tolist()
            starts, ends = where[::tokens], where[tokens - 1 :: tokens]
            between = [
                processor.tokenizer.decode(ids[end + 1 : start], skip_special_tokens=True)
                for end, start in zip(ends, starts[1:], strict=False)
            ]
            crops = _crops(between) if starts else []
            sizes = [None] * len(crops) if batch.sizes is None else batch.sizes[row]
            places.append([_boxes(isqrt(tokens), count, size) for count, size in zip(crops, sizes, strict=False)])
        return places

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """Sums over the squares of patches that are pooled to one token; see ``Family.per_token``."""
        values = torch.cat(list(patches))  # (views, patches)
        side = isqrt(values.shape[1])
        return merged(values, (side, side), side // isqrt(model.config.mm_tokens_per_image)).flatten()

    def pixel_rows(self, model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> Tensor:
        """``pixel_values`` has one entry per picture or crop; see ``Family.pixel_rows``."""
        tokens = (batch["input_ids"] == self.image_token(model.config)).sum(dim=1).cpu()  # (B,)
        return torch.arange(batch.rows).repeat_interleave(tokens // model.config.mm_tokens_per_image)


def _crops(between: Sequence[str]) -> list[int]:
    """Number of crops of every picture in a row.

    Args:
        between: What the prompt says between one square of image tokens and the next. The processor sets
            squares off by newlines, announces the first crop, and joins crops by one space.
    """
    crops = [0]
    for text in between:
        inner = text.strip("\n")
        if inner.strip().startswith(CROPS) or (inner == " " and crops[-1] > 0):
            crops[-1] += 1
        else:
            crops.append(0)
    return crops


def _boxes(side: int, crops: int, size: tuple[int, int] | None) -> Tensor:
    """Boxes of one picture's tokens.

    Args:
        side: Tokens along one side of a square.
        crops: Number of crops after the whole picture.
        size: (height, width) of the picture, or None when unknown.

    Returns:
        ((1 + crops) * side * side, 4) float32; inf for crops of unknown size.
    """
    whole = cells(side, side)  # (side * side, 4)
    if size is None:
        return torch.cat([whole, torch.full((crops * side**2, 4), torch.inf)])
    height, width = size
    long = max(size)
    step = ceil(long / crops) / long if crops else 1.0
    cuts = [(number * step, min((number + 1) * step, 1.0)) for number in range(crops)]
    windows = [(start, 0.0, end, 1.0) if width >= height else (0.0, start, 1.0, end) for start, end in cuts]
    return torch.cat([whole, *(cells(side, side, within=window) for window in windows)])
