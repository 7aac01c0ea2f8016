"""LLaVA-1.5: one square view of the picture, usually its middle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedModel, ProcessorMixin

from vlmfix.errors import LayoutError, UnsupportedModelError
from vlmfix.models.family import Family, by_row
from vlmfix.models.grid import cells, clipped
from vlmfix.models.layout import Batch


class Llava(Family):
    """LLaVA-1.5: the picture is resized, mostly by its shorter edge, and its middle cropped to a square.

    The square becomes a grid of tokens, line by line; LLaVA-1.5 has 24 x 24 of them. What the crop cuts away
    has no token. Processors of other checkpoints pad to a square or stretch the whole picture instead; the
    settings tell. A vision tower with a class token either drops it (strategy ``default``) or puts it before
    the grid (``full``), where it is an image token that shows no part of the picture.
    """

    title = "LLaVA-1.5"
    model_types = frozenset({"llava"})
    apart = True

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Boxes of the grid, of the visible part alone; see ``Family.patches``.

        Raises:
            UnsupportedModelError: The processor is not LLaVA's own: Pixtral has the same model type.
            LayoutError: The image processor resizes by a rule that is not known here.
        """
        if not isinstance(processor, LlavaProcessor):
            raise UnsupportedModelError(
                f"LLaVA with the processor {type(processor).__name__} is not supported, only LlavaProcessor",
                "use a checkpoint with a CLIP or SigLIP vision tower, such as llava-hf/llava-1.5-7b-hf",
            )
        patch = model.config.vision_config.patch_size
        shown = (int(batch["pixel_values"].shape[-2]), int(batch["pixel_values"].shape[-1]))
        lines, columns = shown[0] // patch, shown[1] // patch
        extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
        pictures = []
        for size in _sizes(batch):
            window = _window(processor, size, shown, (lines * patch, columns * patch))
            pictures.append(_with_class(_grid(lines, columns, window), extra))
        return by_row(batch, self.image_token(model.config), pictures)

    def completed(self, model: PreTrainedModel, processor: ProcessorMixin) -> tuple[ProcessorMixin, dict[str, Any]]:
        """The vision tower's patches and class tokens; see ``Family.completed``."""
        return with_patches(self, model, processor)

    def enlarged(self, processor: ProcessorMixin, size: tuple[int, int], together: int) -> int:
        """The picture padded to a square, or scaled by its shorter edge, before it is cropped; see ``Family.enlarged``.

        Raises:
            LayoutError: The image processor resizes by a rule that is not known here.
        """
        if not isinstance(processor, LlavaProcessor):
            return 0
        square, target = _rule(processor)
        padded = (max(size), max(size)) if square else (0, 0)
        return max(math.prod(padded), math.prod(_resized(padded if square else size, target)))

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """Each token is one patch; see ``Family.per_token``."""
        return without_first(model, torch.cat(list(patches))).flatten()


def with_patches(
    family: Family, model: PreTrainedModel, processor: ProcessorMixin
) -> tuple[ProcessorMixin, dict[str, Any]]:
    """What a LLaVA processor must know of the vision tower; files from before transformers 4.46 do not say it.

    Without a number of class tokens a processor counts none, which with a class token is one token too few.
    """
    config, holder = model.config, copy(processor)
    known = {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": family.class_tokens(model),
    }
    added = {name: value for name, value in known.items() if value and not getattr(processor, name, True)}
    for name, value in added.items():
        setattr(holder, name, value)
    return (holder, added) if added else (processor, {})


def without_first(model: PreTrainedModel, patches: Tensor) -> Tensor:
    """(views, tokens) without each view's first, where the model drops that as the class token."""
    return patches[:, 1:] if model.config.vision_feature_select_strategy == "default" else patches


def _sizes(batch: Batch) -> list[tuple[int, int] | None]:
    """(height, width) of every picture of the batch, None where unknown."""
    if batch.sizes is None:
        return [None] * len(batch["pixel_values"])
    return [size for row in batch.sizes for size in row]


def _grid(lines: int, columns: int, window: tuple[float, float, float, float] | None) -> Tensor:
    """(lines * columns, 4) boxes of the tokens of a window of the picture; inf where it is unknown."""
    if window is None:
        return torch.full((lines * columns, 4), torch.inf)
    return clipped(cells(lines, columns, within=window))


def _with_class(grid: Tensor, extra: int) -> Tensor:
    """The grid after ``extra`` class tokens; -1: there is none, and the first patch is dropped for one."""
    return grid[-extra:] if extra < 0 else torch.cat([torch.full((extra, 4), torch.nan), grid])


def _window(
    processor: LlavaProcessor, size: tuple[int, int] | None, shown: tuple[int, int], covered: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """The part of a picture that its patches cover.

    Args:
        processor: Its image processor tells how pictures are resized and padded.
        size: (height, width) of the picture, or None when unknown.
        shown: (height, width) of what the vision tower gets.
        covered: (height, width) of the whole patches in it.

    Returns:
        x0, y0, x1, y1 as fractions of the picture, below 0 or above 1 where it is padded; None when it
        depends on an unknown size.
    """
    square, target = _rule(processor)
    if size is None and (square or "height" not in target):
        return None
    height, width = size or shown  # stretched to a fixed size: any will do
    padded = (max(height, width), max(height, width)) if square else (height, width)
    resized = _resized(padded, target)
    y0, y1 = _stretch(height, padded[0], resized[0], shown[0], covered[0])
    x0, x1 = _stretch(width, padded[1], resized[1], shown[1], covered[1])
    return x0, y0, x1, y1


def _rule(processor: LlavaProcessor) -> tuple[bool, dict[str, int]]:
    """Whether the image processor pads to a square first, and the ``size`` that it resizes to; empty for none."""
    settings = processor.image_processor
    square = bool(settings.do_pad) and hasattr(settings, "pad_to_square")
    return square, dict(settings.size) if settings.do_resize else {}


def _resized(size: tuple[int, int], target: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) of a picture after resizing to the image processor's ``size``; empty for none."""
    if not target:
        return size
    if target.keys() == {"height", "width"}:
        return target["height"], target["width"]
    if target.keys() == {"shortest_edge"}:
        short, long = target["shortest_edge"], int(target["shortest_edge"] * max(size) / min(size))
        return (short, long) if size[0] <= size[1] else (long, short)
    raise LayoutError(
        f"the image processor resizes by {dict(target)}; known are height and width, or shortest_edge",
        "use the processor that comes with the checkpoint",
    )


def _stretch(length: int, padded: int, resized: int, shown: int, covered: int) -> tuple[float, float]:
    """Where the patches begin and end along one axis, as fractions of the picture's own length.

    Args:
        length: Pixels of the picture.
        padded: Pixels after padding to a square, half of it on either side.
        resized: Pixels after resizing.
        shown: Pixels after cropping, or filling up, to the middle.
        covered: Pixels of the whole patches.
    """
    start = (resized - shown) // 2 if resized >= shown else -((shown - resized) // 2)
    border = (padded - length) // 2
    scale = padded / resized
    return (start * scale - border) / length, ((start + covered) * scale - border) / length
