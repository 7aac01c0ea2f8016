"""InternVL in transformers format: tiles row by row, then a thumbnail of the whole picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vlmfix.models.family import Family
from vlmfix.models.grid import cells, merged
from vlmfix.models.layout import Batch
from vlmfix.models.llava import without_first
from vlmfix.upstream.geometry import tile_grid


class InternVL(Family):
    """InternVL: the picture is stretched over a grid of square tiles whose shape is nearest to its own.

    Each tile becomes a square of tokens, row by row; merging patches (pixel shuffle) keeps their order. With
    more than one tile a thumbnail, the whole picture in one square, comes last, so every spot is shown twice.
    The shape of the grid follows from the picture's size alone: where that is unknown, the thumbnail has a
    place and the tiles have none.
    """

    title = "InternVL"
    model_types = frozenset({"internvl"})
    apart = True

    def sharing(self, processor: ProcessorMixin) -> Any:  # noqa: ANN401 (see the base)
        """A copy that leaves the tiles as the image processor returned them; see ``Family.sharing``."""
        sharing = super().sharing(processor)
        # Else it puts tiles in the order of pictures and videos in the text, and wants tiles for each of them.
        sharing.multimodal_pattern = re.compile("(?!)")
        return sharing

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Boxes of every tile's tokens, then of the thumbnail's; see ``Family.patches``."""
        side = _side(model.config)
        places = []
        for row, marked in enumerate((batch["input_ids"] == self.image_token(model.config)).tolist()):
            squares = [tokens // side**2 for tokens in _runs(marked)]
            sizes = [None] * len(squares) if batch.sizes is None else batch.sizes[row]
            grids = [None if size is None else _grid(processor, size) for size in sizes]
            places.append([_boxes(count, side, grid) for count, grid in zip(squares, grids, strict=False)])
        return places

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """Sums over the squares of patches that become one token; see ``Family.per_token``."""
        values = without_first(model, torch.cat(list(patches)))  # (views, patches)
        side = math.isqrt(values.shape[1])
        return merged(values, (side, side), round(1 / model.config.downsample_ratio)).flatten()

    def pixel_rows(self, model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> Tensor:
        """``pixel_values`` has one entry per tile or thumbnail; see ``Family.pixel_rows``."""
        tokens = (batch["input_ids"] == self.image_token(model.config)).sum(dim=1).cpu()  # (B,)
        return torch.arange(batch.rows).repeat_interleave(tokens // _side(model.config) ** 2)  # (tiles,)


def _side(config: PreTrainedConfig) -> int:
    """Tokens along one side of a tile."""
    vision = config.vision_config
    return int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)


def _runs(marked: Sequence[bool]) -> list[int]:
    """Lengths of the runs of image tokens: one run per picture, for a token of its own closes each."""
    return [len(list(run)) for is_image, run in groupby(marked) if is_image]


def _grid(processor: ProcessorMixin, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the tiles of a picture of (height, width) pixels."""
    settings = processor.image_processor
    tile = (settings.size["height"], settings.size["width"])
    return tile_grid(size, tile, settings.min_patches, settings.max_patches)


def _boxes(squares: int, side: int, grid: tuple[int, int] | None) -> Tensor:
    """Boxes of one picture's tokens.

    Args:
        squares: Number of tiles, the thumbnail included.
        side: Tokens along one side of a tile.
        grid: (rows, columns) of the tiles, or None when the picture's size is unknown.

    Returns:
        (squares * side * side, 4) float32; inf for tiles without a grid.
    """
    whole = cells(side, side)  # (side * side, 4)
    if squares == 1:
        return whole
    if grid is None:
        return torch.cat([torch.full(((squares - 1) * side**2, 4), torch.inf), whole])
    return torch.cat([cells(side, side, within=tile) for tile in cells(*grid).tolist()] + [whole])
