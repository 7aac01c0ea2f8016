"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: each picture at its own resolution, in patches, never cropped."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.models.family import Family, by_row
from vlmfix.models.grid import cells
from vlmfix.models.layout import Batch


class QwenVL(Family):
    """Qwen-VL: the picture is stretched to whole patches, and each square of patches merges into one token.

    The processor says in ``image_grid_thw`` how many patches high and wide every picture became; the tokens
    run through the merged grid row by row. The grid covers the whole picture, so its size is not needed.
    """

    title = "Qwen2-VL, Qwen2.5-VL and Qwen3-VL"
    model_types = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """One box per merged square of patches; see ``Family.patches``."""
        merge = model.config.vision_config.spatial_merge_size
        grids = (batch["image_grid_thw"][:, 1:] // merge).tolist()
        pictures = [cells(rows, columns) for rows, columns in grids]
        return by_row(batch, self.image_token(model.config), pictures)

    def pixel_rows(self, model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> Tensor:
        """``pixel_values`` has one entry per patch before merging; see ``Family.pixel_rows``."""
        owner = super().pixel_rows(model, batch, counts)
        return owner.repeat_interleave(batch["image_grid_thw"].prod(dim=1).cpu())  # (patches,)
