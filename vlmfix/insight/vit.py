"""Loads a vision transformer from timm, and reads where its class token looks in a picture.

Shape letters (``docs/notation.md``): H heads and D head dimension, here of the ViT; here also V pictures and N tokens
of each, class and register tokens included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfix.attention.tower import TowerReading
from vlmfix.errors import DataError, UpstreamError
from vlmfix.files import path_of
from vlmfix.upstream import vit as upstream

TOGETHER = 16
"""Most pictures in one pass."""
HINT = "give the name of a timm model with a class token, such as vit_base_patch16_224.dino, or a folder with one"


@dataclass(frozen=True, eq=False)
class ViT:
    """Reads the attention of a ViT with a class token.

    Attributes:
        model: timm's ``VisionTransformer``, in eval mode and float32.
        transform: Makes (3, height, width) pixels of a picture: the whole of it, stretched.
        device: Where it runs.
    """

    model: Any
    transform: Callable[[Image.Image], Tensor]
    device: torch.device

    @torch.no_grad()
    def maps(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Computes the attention that each patch of the pictures gets, summed over heads.

        Args:
            pictures: RGB.

        Returns:
            For each, (3, lines, columns) float32 on the CPU: from the class token in the first and in the penultimate
            block, and from all patches in the first.
        """
        found: list[Tensor] = []
        for start in range(0, len(pictures), TOGETHER):
            pixels = torch.stack([self.transform(picture) for picture in pictures[start : start + TOGETHER]])
            found += self._maps(pixels.to(self.device)).cpu().unbind()
        return found

    def _maps(self, pixels: Tensor) -> Tensor:
        """Computes the maps, (V, 3, lines, columns), of pixels, (V, 3, height, width)."""
        prefix, blocks = self.model.num_prefix_tokens, self.model.blocks
        first, penultimate = TowerReading(0, "class", prefix), TowerReading(-2, "class", prefix)
        spatial = TowerReading(0, "patches", prefix)

        def early(query: Tensor, key: Tensor, scale: float) -> None:
            for reading in (first, spatial):
                reading.read(query, key, None, scale)

        def late(query: Tensor, key: Tensor, scale: float) -> None:
            penultimate.read(query, key, None, scale)

        with upstream.watched(blocks[0].attn, early), upstream.watched(blocks[-2].attn, late):
            self.model.forward_features(pixels)
        sums = torch.stack([reading.sums[0][:, prefix:] for reading in (first, penultimate, spatial)], dim=1)
        maps: Tensor = sums.unflatten(2, self.model.patch_embed.grid_size)
        return maps

    def digest(self) -> str:
        """Computes the SHA-256 of the ViT's weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(value.cpu().numpy().tobytes())
        return found.hexdigest()


@lru_cache(maxsize=2)
def load_vit(name: str, device: torch.device) -> ViT:
    """Loads a ViT, once for a name and a device.

    Args:
        name: A timm model, which is downloaded when it is not in the cache, or a folder that timm wrote, with
            ``config.json`` and weights.
        device: Where it runs.

    Raises:
        DataError: There is no such model, it cannot be read, or its class token's attention cannot.
        UpstreamError: The installed timm does not show the attention.
    """
    folder = path_of(name)
    try:
        model = upstream.load(name, folder)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot load the ViT {name!r}: {lines[0]}", HINT) from error
    if not upstream.is_plain(model):
        raise DataError(f"{name!r} is no plain ViT with a class token and two blocks", HINT)
    if reason := upstream.lacking(model):
        raise UpstreamError(reason, "install timm 1.0.31")
    return ViT(model.to(device).eval(), upstream.transform(model), device)
