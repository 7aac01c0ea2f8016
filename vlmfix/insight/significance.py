"""Measures each image token's significance to an encoder that sees the picture alone: the model's tower or a ViT.

Three numbers per token, all sums of attention weights over heads: the class token's attention to it in the first and in
the penultimate layer, and the patches' in the first. Only their order within a picture matters, and for the second how
far the largest stand out.

Shape letters (``docs/notation.md``): B rows, T prompt tokens; here also N image tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlmfix.attention.tower import TowerReading, TowerRows, tower_read
from vlmfix.decoding.encoding import distinct, first_rows
from vlmfix.errors import IncompatibleDecodersError, LayoutError
from vlmfix.insight.vit import load_vit
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream.features import encoded

FIRST, PENULTIMATE = 0, -2
"""The layers that are read."""


class Significance(NamedTuple):
    """Holds three numbers per prompt token, each (B, T) float32 on the CPU; NaN for a token without a picture part.

    Attributes:
        first: Attention of the class token in the first layer.
        penultimate: Attention of the class token in the penultimate layer.
        spatial: Attention of the patches in the first layer.
    """

    first: Tensor
    penultimate: Tensor
    spatial: Tensor


def no_class_token(vlm: Checkpoint) -> str | None:
    """Says why the vision tower has no attention of a class token to read; None when it has."""
    if vlm.family.class_tokens(vlm.model):
        return None
    return (
        f"the vision tower of {vlm.family.title} has no class token: "
        "name a timm ViT that has one (vit=...), or take the attention that patches receive (significance=received)"
    )


def too_shallow(vlm: Checkpoint) -> str | None:
    """Says why the vision tower has no penultimate layer; None when it has."""
    count = len(vlm.family.tower_attention(vlm.model))
    return None if count >= -PENULTIMATE else f"its vision tower has {count} layer, and none before the last"


@torch.no_grad()
def of_tower(vlm: Checkpoint, batch: Batch, layout: ImageLayout, *, rows: TowerRows) -> Significance:
    """Reads significance from the model's own vision tower, in one more pass over each distinct picture.

    When several patches become one token, their numbers are summed. Each tile has its own class token.

    Args:
        vlm: The model.
        batch: B rows, some of them with pictures.
        layout: Where their image tokens are.
        rows: The class token's, or those of all patches, which then stand in for it in both layers.
    """
    wanted: list[tuple[int, TowerRows]] = [(FIRST, rows), (PENULTIMATE, rows), (FIRST, "patches")]
    readings = {key: TowerReading(*key, classes=vlm.family.class_tokens(vlm.model)) for key in wanted}
    first, inputs = distinct(vlm, batch)
    with tower_read(vlm, list(readings.values())):
        encoded(vlm.model, inputs)
    found = [vlm.family.per_token(vlm.model, inputs, readings[key].sums) for key in wanted]
    spread = [_over_rows(vlm, batch, first, values) for values in found]
    return Significance(*(values.masked_fill(~layout.tokens.cpu(), torch.nan) for values in spread))


def _over_rows(vlm: Checkpoint, batch: Batch, first: Sequence[int], values: Tensor) -> Tensor:
    """Copies each distinct picture's values to every row that shows it; returns (B, T)."""
    marked = (batch["input_ids"] == vlm.family.image_token(vlm.model.config)).cpu()  # (B, T)
    counts = marked.sum(dim=1).tolist()
    kept = sorted({row for row in first if counts[row]})
    if sum(counts[row] for row in kept) != len(values):
        raise LayoutError(
            f"the vision tower saw {len(values)} image tokens, the prompts have {sum(counts[row] for row in kept)}",
            "the inputs were cut, or made with another processor",
        )
    parts = dict(zip(kept, values.cpu().split([counts[row] for row in kept]), strict=True))
    whole = torch.full(marked.shape, torch.nan)
    for row, source in enumerate(first):
        if counts[row]:
            whole[row, marked[row]] = parts[source]
    return whole


@torch.no_grad()
def of_vit(name: str, batch: Batch, layout: ImageLayout, device: torch.device) -> Significance:
    """Reads significance from another ViT: for each token, the mean of the ViT's maps over the token's box.

    Args:
        name: The ViT, as in ``vit.load_vit``.
        batch: B rows with their pictures.
        layout: Where their image tokens look; those without a place get no value.
        device: Where the ViT runs.

    Raises:
        IncompatibleDecodersError: The batch does not say which pictures it was made of.
        DataError: There is no such ViT, or it cannot be read.
    """
    if batch.pictures is None:
        raise IncompatibleDecodersError(
            "a ViT of one's own looks at the pictures, and these inputs hold encoded ones alone",
            "make them with vlm.encode(prompts, pictures)",
        )
    first = first_rows(batch)
    rows = [row for row, source in enumerate(first) if source == row and batch.pictures[row]]
    maps = iter(load_vit(name, device).maps([picture for row in rows for picture in batch.pictures[row]]))
    own = {row: [next(maps) for _ in batch.pictures[row]] for row in rows}
    whole = torch.full((3, *layout.tokens.shape), torch.nan)
    boxes, numbers = layout.boxes.cpu(), layout.image.cpu()
    for row, source in enumerate(first):
        for image, found in enumerate(own.get(source, ())):
            mine = numbers[row] == image  # (T,)
            whole[:, row, mine] = over_boxes(found, boxes[row, mine])
    return Significance(*whole)


def over_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """Averages maps over boxes; a cell counts by the share of the box that it covers.

    Args:
        maps: (n, lines, columns) over a whole picture.
        boxes: (N, 4) x0, y0, x1, y1 in [0, 1]; NaN for a token without a place.

    Returns:
        (n, N) float32, NaN without a place.
    """
    lines, columns = maps.shape[-2:]
    across = _shares(boxes[:, 0], boxes[:, 2], columns)  # (N, columns)
    down = _shares(boxes[:, 1], boxes[:, 3], lines)  # (N, lines)
    return torch.einsum("bl,nlc,bc->nb", down, maps.double(), across).float()


def _shares(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Computes the share of each interval, start to end in [0, 1], in each of equal cells; (N, cells) float64."""
    low, high = start.double()[:, None] * cells, end.double()[:, None] * cells  # (N, 1)
    cell = torch.arange(cells)
    covered = (torch.minimum(high, cell + 1.0) - torch.maximum(low, cell.double())).clamp(min=0)
    return covered / (high - low)
