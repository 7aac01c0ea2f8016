"""A vision transformer from timm, and where its class token looks in a picture.

Shape letters (``docs/notation.md``): H heads and D head dimension, here of the ViT; here also V pictures and N tokens
of each, class and register tokens included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlmfix.attention.tower import TowerReading
from vlmfix.errors import DataError

TOGETHER = 16
"""Pictures that run side by side."""
HINT = "give the name of a timm model with a class token, such as vit_base_patch16_224.dino, or a folder with one"


@dataclass(frozen=True, eq=False)
class ViT:
    """A ViT with a class token.

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
        """Attention that each patch of the pictures gets, summed over heads.

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
        """(V, 3, lines, columns) for (V, 3, height, width)."""
        prefix, blocks = self.model.num_prefix_tokens, self.model.blocks
        first, penultimate = TowerReading(0, "class", prefix), TowerReading(-2, "class", prefix)
        spatial = TowerReading(0, "patches", prefix)
        with _read(blocks[0].attn, [first, spatial]), _read(blocks[-2].attn, [penultimate]):
            self.model.forward_features(pixels)
        sums = torch.stack([reading.sums[0][:, prefix:] for reading in (first, penultimate, spatial)], dim=1)
        maps: Tensor = sums.unflatten(2, self.model.patch_embed.grid_size)
        return maps

    def digest(self) -> str:
        """SHA-256 of its weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(value.cpu().numpy().tobytes())
        return found.hexdigest()


@contextmanager
def _read(attention: Any, readings: Sequence[TowerReading]) -> Iterator[None]:  # noqa: ANN401
    """Lets readings see the queries and keys of an attention module of timm inside the block."""
    seen: list[Tensor] = []

    def query(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output)

    def key(module: nn.Module, inputs: object, output: Tensor) -> None:
        for reading in readings:
            reading.read(seen[0], output, None, float(attention.scale))

    hooks = [
        attention.q_norm.register_forward_hook(query),  # called before the other, also without a norm
        attention.k_norm.register_forward_hook(key),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@lru_cache(maxsize=2)
def load_vit(name: str, device: torch.device) -> ViT:
    """Loads a ViT, once for a name and a device.

    Args:
        name: A timm model, which is downloaded when it is not in the cache, or a folder that timm wrote, with
            ``config.json`` and weights.
        device: Where it runs.

    Raises:
        DataError: There is no such model, it cannot be read, or its class token's attention cannot.
    """
    import timm  # here alone: every other decoder does without it
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import VisionTransformer

    folder = Path(name).expanduser()
    try:
        model: Any = timm.create_model(f"local-dir:{folder}" if folder.is_dir() else name, pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot load the ViT {name!r}: {lines[0]}", HINT) from error
    plain = isinstance(model, VisionTransformer) and all(type(block.attn) is Attention for block in model.blocks)
    if not plain or model.cls_token is None or len(model.blocks) < 2:
        raise DataError(f"{name!r} is no plain ViT with a class token and two blocks", HINT)
    config = {**resolve_model_data_config(model), "crop_pct": 1.0, "crop_mode": "squash"}  # the whole picture
    return ViT(model.to(device).eval(), create_transform(**config), device)
