"""LLaVA-1.5: one square view of the picture, usually its middle."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel, ProcessorMixin

from vlmfix.errors import LayoutError, UnsupportedModelError
from vlmfix.models.family import Family, by_row
from vlmfix.models.grid import cells, clipped
from vlmfix.models.layout import Batch


class Llava(Family):
    """LLaVA-1.5: the picture is resized, mostly by its shorter edge, and its middle cropped to a square.

    The square becomes a grid of tokens, line by line; LLaVA-1.5 has 24 x 24 of them. What the crop cuts away has no
    token. Processors of other checkpoints pad to a square or stretch the whole picture instead; the settings tell.
    A vision tower with a class token either drops it (strategy ``default``) or puts it before the grid (``full``),
    where it is an image token that shows no part of the picture.
    """

    title = "LLaVA-1.5"
    model_types = frozenset({"llava"})

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Boxes of the grid, of the visible part alone; see ``Family.patches``.

        Raises:
            UnsupportedModelError: The vision tower is Pixtral's, which keeps every picture's own shape.
            LayoutError: The image processor resizes by a rule that is not known here.
        """
        vision = model.config.vision_config
        if vision.model_type == "pixtral":
            raise UnsupportedModelError(
                "LLaVA with a Pixtral vision tower is not supported", "use a checkpoint with a CLIP or SigLIP tower"
            )
        shown = (int(batch["pixel_values"].shape[-2]), int(batch["pixel_values"].shape[-1]))
        lines, columns = shown[0] // vision.patch_size, shown[1] // vision.patch_size
        covered = (lines * vision.patch_size, columns * vision.patch_size)
        sizes = [None] * len(batch["pixel_values"]) if batch.sizes is None else [s for row in batch.sizes for s in row]
        windows = [_window(processor.image_processor, size, shown, covered) for size in sizes]
        extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
        pictures = [_with_class(_grid(lines, columns, window), extra) for window in windows]
        return by_row(batch, self.image_token(model.config), pictures)


def _grid(lines: int, columns: int, window: tuple[float, float, float, float] | None) -> Tensor:
    """(lines * columns, 4) boxes of the tokens of a window of the picture; inf where it is unknown."""
    if window is None:
        return torch.full((lines * columns, 4), torch.inf)
    return clipped(cells(lines, columns, within=window))


def _with_class(grid: Tensor, extra: int) -> Tensor:
    """The grid after ``extra`` class tokens; -1 when the tower has none and its first patch is dropped for one."""
    return grid[-extra:] if extra < 0 else torch.cat([torch.full((extra, 4), torch.nan), grid])


def _window(
    settings: BaseImageProcessor, size: tuple[int, int] | None, shown: tuple[int, int], covered: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """The part of a picture that its patches cover.

    Args:
        settings: The image processor.
        size: (height, width) of the picture, or None when unknown.
        shown: (height, width) of what the vision tower gets.
        covered: (height, width) of the whole patches in it.

    Returns:
        x0, y0, x1, y1 as fractions of the picture, below 0 or above 1 where it is padded; None when that depends on
        an unknown size.
    """
    square = bool(settings.do_pad) and hasattr(settings, "pad_to_square")
    stretched = bool(settings.do_resize) and settings.size.height is not None and not square
    if size is None and not stretched:
        return None
    height, width = size or shown
    padded = (max(height, width),) * 2 if square else (height, width)
    resized = _resized(settings, padded)
    y0, y1 = _stretch(height, padded[0], resized[0], shown[0], covered[0])
    x0, x1 = _stretch(width, padded[1], resized[1], shown[1], covered[1])
    return x0, y0, x1, y1


def _resized(settings: BaseImageProcessor, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture after the image processor's resizing."""
    if not settings.do_resize:
        return size
    target = settings.size
    if target.height and target.width:
        return target.height, target.width
    if target.shortest_edge and not target.longest_edge:
        short, long = sorted(size)
        new = target.shortest_edge, int(target.shortest_edge * long / short)
        return new if size[0] <= size[1] else new[::-1]
    raise LayoutError(
        f"image processor resizes by {dict(target)}, allowed are height and width, or shortest_edge",
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
