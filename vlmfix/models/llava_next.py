"""LLaVA-NeXT (LLaVA-1.6): the whole picture in one tile, then the same in many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.models.anyres import anyres
from vlmfix.models.family import Family, by_row
from vlmfix.models.grid import cells
from vlmfix.models.layout import Batch
from vlmfix.models.llava import with_patches, without_first
from vlmfix.upstream.geometry import packed, tile_count


class LlavaNext(Family):
    """LLaVA-NeXT: a base tile that shows the whole picture stretched to a square, then its large tiles.

    The large tiles are read line by line across all of them, without what was padding; a newline token ends
    each line. It stands among the image tokens and shows nothing. Every spot of the picture is thus shown
    twice, coarsely and finely. The picture's size travels with the inputs, as ``image_sizes``.
    """

    title = "LLaVA-NeXT"
    model_types = frozenset({"llava_next"})

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Boxes of the base tile, then of the large tiles with their newlines; see ``Family.patches``."""
        config = model.config
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        side, seen = tile // patch, tile // patch * patch / tile
        base = cells(side, side, within=(0.0, 0.0, seen, seen))  # (side * side, 4)
        pictures = []
        for height, width in batch["image_sizes"].tolist():
            large = anyres((height, width), canvases=config.image_grid_pinpoints, tile=tile, patch=patch)
            pictures.append(torch.cat([base, large]))  # (n, 4)
        return by_row(batch, self.image_token(config), pictures)

    def completed(self, model: PreTrainedModel, processor: ProcessorMixin) -> tuple[ProcessorMixin, dict[str, Any]]:
        """The vision tower's patches and class tokens; see ``Family.completed``."""
        return with_patches(self, model, processor)

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """The model's own packing of tiles, for values in place of features; see ``Family.per_token``."""
        config, sizes = model.config, inputs["image_sizes"]
        tile = config.vision_config.image_size
        counts = [tile_count("llava_next", size, config.image_grid_pinpoints, tile) for size in sizes]
        values = without_first(model, torch.cat(list(patches)))[..., None]  # (views, patches, 1)
        return packed(
            model,
            values.split(counts),
            sizes,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=values.new_full((1,), torch.nan),
        )
