"""How processors and models cut pictures, by their own functions; each is looked up when a family asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmfix.upstream.versions import missing


def best_canvas(size: tuple[int, int], canvases: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The canvas, (height, width), that LLaVA-NeXT and LLaVA-OneVision resize a picture into.

    Args:
        size: (height, width) of the picture in pixels.
        canvases: Allowed (height, width).
    """
    height, width = _function("image_processing_utils", "select_best_resolution")(size, canvases)
    return height, width


def tile_count(family: str, size: Tensor, canvases: Sequence[Sequence[int]], tile: int) -> int:
    """Tiles of a picture, the base tile included.

    Args:
        family: ``llava_next`` or ``llava_onevision``.
        size: (2,) height and width of the picture in pixels.
        canvases: Allowed (height, width).
        tile: Edge of a tile in pixels.
    """
    count = _function(f"models.{family}.modeling_{family}", "image_size_to_num_patches")
    return int(count(size, canvases, tile))


def tile_grid(size: tuple[int, int], tile: tuple[int, int], fewest: int, most: int) -> tuple[int, int]:
    """(rows, columns) of the tiles that InternVL cuts a picture into.

    Args:
        size: (height, width) of the picture in pixels.
        tile: (height, width) of a tile in pixels.
        fewest: Fewest tiles.
        most: Most tiles.
    """
    canvas = _function("models.got_ocr2.image_processing_got_ocr2", "get_optimal_tiled_canvas")
    columns, rows = canvas(size, tile, fewest, most)
    return rows, columns


def window_order(grids: Tensor, *, merge: int, window: int, patch: int) -> Tensor:
    """(n,) int64, the order in which Qwen2.5-VL's vision tower sees merged patches, window by window.

    Args:
        grids: (pictures, 3) patches of each picture: frames, lines and columns.
        merge: Patches along an edge that are merged to one token.
        window: Edge of a window in pixels.
        patch: Edge of a patch in pixels.
    """
    index = _function("vision_utils", "get_vision_window_index")
    order, _ = index(grids, spatial_merge_size=merge, window_size=window, patch_size=patch)
    return torch.as_tensor(order)


def packed(model: PreTrainedModel, values: Sequence[Tensor], sizes: Tensor, **options: Any) -> Tensor:
    """(n,) values of all tokens of pictures in tiles, in the model's own order.

    Args:
        model: A LLaVA-NeXT or LLaVA-OneVision model.
        values: For each picture, (tiles, patches, 1).
        sizes: (pictures, 2) heights and widths in pixels.
        **options: What the model's ``pack_image_features`` takes besides.

    Raises:
        UpstreamError: The model has no such method.
    """
    pack: Any = getattr(model.base_model, "pack_image_features", None)
    if pack is None:
        raise missing(f"{type(model.base_model).__name__} has no pack_image_features")
    parts, _ = pack(values, sizes, **options)
    return torch.cat(list(parts)).flatten()


def _function(module: str, name: str) -> Any:  # noqa: ANN401 (a function of transformers)
    try:
        return getattr(import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise missing(f"there is no {name} in transformers.{module}") from error
