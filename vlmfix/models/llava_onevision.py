"""LLaVA-OneVision: tiles for a picture that is alone in its prompt, one square for each of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vlmfix.models.anyres import anyres
from vlmfix.models.family import Family, by_row
from vlmfix.models.grid import cells, clipped
from vlmfix.models.layout import Batch
from vlmfix.models.llava import without_first
from vlmfix.upstream.geometry import packed, tile_count


class LlavaOneVision(Family):
    """LLaVA-OneVision: a base tile and large tiles as in LLaVA-NeXT, but with a limit on their tokens.

    More than ``anyres_max_N`` tiles' worth of features are resized to about N tiles, so that a token may show
    a bit more than one patch. A picture that shares its prompt with others is padded to a square and seen in
    one tile with a single newline token at its end. The picture's size travels with the inputs, as
    ``image_sizes``, and which pictures share a prompt as ``batch_num_images``.
    """

    title = "LLaVA-OneVision"
    model_types = frozenset({"llava_onevision"})

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Boxes of the base tile and the large tiles, or of the one tile; see ``Family.patches``."""
        pictures = [
            _tiled(model.config, (height, width)) if single else _padded(model.config, (height, width))
            for (height, width), single in zip(batch["image_sizes"].tolist(), _alone(batch), strict=True)
        ]
        return by_row(batch, self.image_token(model.config), pictures)

    def enlarged(self, processor: ProcessorMixin, size: tuple[int, int], together: int) -> int:
        """The square that a picture beside others is padded to; see ``Family.enlarged``."""
        return max(size) ** 2 if together > 1 else 0

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """The model's own packing of tiles, for values in place of features; see ``Family.per_token``.

        Where the model resizes features to fewer, values are resized and not summed.
        """
        config, sizes = model.config, inputs["image_sizes"]
        tile = config.vision_config.image_size
        counts = [
            tile_count("llava_onevision", size, config.image_grid_pinpoints, tile) if single else 1
            for size, single in zip(sizes, _alone(inputs), strict=True)
        ]
        values = without_first(model, torch.cat(list(patches)))[..., None]  # (views, patches, 1)
        return packed(
            model,
            values.split(counts),
            sizes,
            image_newline=values.new_full((1,), torch.nan),
            vision_aspect_ratio=config.vision_aspect_ratio,
        )


def _alone(inputs: Mapping[str, Tensor]) -> list[bool]:
    """For each picture, whether it is the only one of its prompt."""
    if "batch_num_images" not in inputs:
        return [True] * len(inputs["image_sizes"])
    return [count == 1 for count in inputs["batch_num_images"].tolist() for _ in range(count)]


def _tiled(config: PreTrainedConfig, size: tuple[int, int]) -> Tensor:
    """(n, 4) boxes of a picture of (height, width) pixels that is alone in its prompt."""
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    seen = tile // patch * patch / tile
    base = cells(tile // patch, tile // patch, within=(0.0, 0.0, seen, seen))
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    large = anyres(size, canvases=config.image_grid_pinpoints, tile=tile, patch=patch, most=most)
    return torch.cat([base, large])  # (n, 4)


def _padded(config: PreTrainedConfig, size: tuple[int, int]) -> Tensor:
    """(n, 4) boxes of a picture of (height, width) pixels that is one of several, then a newline."""
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    height, width = size
    square, seen = max(size), max(size) * (tile // patch * patch / tile)
    left, top = (square - width) // 2, (square - height) // 2
    window = (-left / width, -top / height, (seen - left) / width, (seen - top) / height)
    grid = clipped(cells(tile // patch, tile // patch, within=window))
    return torch.cat([grid, torch.full((1, 4), torch.nan)])  # (n, 4)
