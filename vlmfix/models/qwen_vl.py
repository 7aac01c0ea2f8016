"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: each picture at its own resolution, in patches, never cropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.errors import UsageError
from vlmfix.models.family import Family, by_row
from vlmfix.models.grid import cells
from vlmfix.models.layout import Batch
from vlmfix.upstream.geometry import window_order


class QwenVL(Family):
    """Qwen-VL: the picture is stretched to whole patches, and each square of patches merges into one token.

    The processor says in ``image_grid_thw`` how many patches high and wide every picture became; the tokens
    run through the merged grid row by row. The grid covers the whole picture, so its size is not needed.
    """

    title = "Qwen2-VL, Qwen2.5-VL and Qwen3-VL"
    model_types = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})
    apart = True

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """One box per merged square of patches; see ``Family.patches``."""
        merge = model.config.vision_config.spatial_merge_size
        grids = (batch["image_grid_thw"][:, 1:] // merge).tolist()
        pictures = [cells(rows, columns) for rows, columns in grids]
        return by_row(batch, self.image_token(model.config), pictures)

    def limited(self, processor: ProcessorMixin, *, most: int | None, least: int | None) -> ProcessorMixin:
        """Sets ``size["longest_edge"]`` and ``size["shortest_edge"]`` of a copy; see ``Family.limited``.

        Older files call them ``max_pixels`` and ``min_pixels``.
        """
        settings = processor.image_processor
        highest = settings.size["longest_edge"] if most is None else most
        lowest = settings.size["shortest_edge"] if least is None else least
        if highest < lowest and least is None:
            raise UsageError(
                f"max_pixels={most} is below the {lowest} pixels that this processor makes at least",
                f"give {lowest} or more, or min_pixels, too",
            )
        if highest < lowest:
            raise UsageError(
                f"min_pixels={least} is above the {highest} pixels that this processor makes at most",
                f"give {highest} or fewer",
            )
        limited = copy(processor)
        limited.image_processor = copy(settings)
        limited.image_processor.size = replace(settings.size, longest_edge=highest, shortest_edge=lowest)
        return limited

    def enlarged(self, processor: ProcessorMixin, size: tuple[int, int], together: int) -> int:
        """The picture's own pixels, within the limits; see ``Family.enlarged``."""
        limits = processor.image_processor.size
        return min(max(size[0] * size[1], int(limits["shortest_edge"])), int(limits["longest_edge"]))

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The vision tower; these models call it ``visual``."""
        tower = model.model.visual
        if not isinstance(tower, nn.Module):
            raise TypeError(f"{type(model).__name__} has no visual module")
        return tower

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """Sums over the squares of patches that become one token; see ``Family.per_token``.

        The tower's attention sees the patches of a square one after the other, and in Qwen2.5-VL the squares of a
        window one after the other.
        """
        vision = model.config.vision_config
        values = torch.cat([part.flatten() for part in patches])  # (patches,)
        sums = values.view(-1, vision.spatial_merge_size**2).sum(dim=1)  # (n,)
        if not hasattr(vision, "window_size"):
            return sums
        order = window_order(
            inputs["image_grid_thw"],
            merge=vision.spatial_merge_size,
            window=vision.window_size,
            patch=vision.patch_size,
        )
        return sums[order.argsort().to(sums.device)]

    def pixel_rows(self, model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> Tensor:
        """``pixel_values`` has one entry per patch before merging; see ``Family.pixel_rows``."""
        owner = super().pixel_rows(model, batch, counts)
        return owner.repeat_interleave(batch["image_grid_thw"].prod(dim=1).cpu())  # (patches,)
