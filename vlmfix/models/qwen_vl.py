"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: each picture at its own resolution, cut into patches and never cropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.models.family import Family
from vlmfix.models.grid import cells
from vlmfix.models.layout import Batch


class QwenVL(Family):
    """Qwen-VL: the whole picture is stretched to whole patches, and each square of patches merges into one token.

    The processor says in ``image_grid_thw`` how many patches high and wide every picture became; the tokens run
    through the merged grid row by row. No size of the original is needed: the grid always covers all of it.
    """

    title = "Qwen2-VL, Qwen2.5-VL and Qwen3-VL"
    model_types = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """One box per merged square of patches; see ``Family.patches``."""
        merge = int(model.config.vision_config.spatial_merge_size)
        grids = iter((batch["image_grid_thw"][:, 1:] // merge).tolist())
        tokens = (batch["input_ids"] == self.image_token(model.config)).sum(dim=1)  # (B,)
        return [_pictures(grids, count) for count in tokens.tolist()]

    def pixel_rows(self, model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> Tensor:
        """``pixel_values`` has one entry per patch, all pictures one after the other; see ``Family.pixel_rows``."""
        owner = super().pixel_rows(model, batch, counts)
        return owner.repeat_interleave(batch["image_grid_thw"].prod(dim=1).cpu())  # (patches,)


def _pictures(grids: Iterator[list[int]], tokens: int) -> list[Tensor]:
    """Boxes of the next pictures, as many as fill the image tokens of one row."""
    pictures: list[Tensor] = []
    while tokens > 0 and (grid := next(grids, None)) is not None:
        rows, columns = grid
        pictures.append(cells(rows, columns))
        tokens -= rows * columns
    return pictures
