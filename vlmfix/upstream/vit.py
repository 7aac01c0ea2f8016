"""timm's plain vision transformers: loading one, and seeing the queries and keys of a block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from vlmfix.upstream.versions import installed

NEEDED = {
    "q_norm": "attention",
    "k_norm": "attention",
    "scale": "attention",
    "num_prefix_tokens": "model",
    "patch_embed": "model",
}
"""What is read of a model and of a block's attention."""


def load(name: str, folder: Path) -> Any:  # noqa: ANN401 (timm has no types)
    """Loads a model.

    Args:
        name: A timm model, which is downloaded when it is not in the cache.
        folder: The same name as a folder; when it exists, the model is read from there.

    Raises:
        OSError, RuntimeError, ValueError, KeyError: timm cannot load it.
    """
    import timm  # here alone: every other decoder does without it

    return timm.create_model(f"local-dir:{folder}" if os.path.isdir(folder) else name, pretrained=True)


def transform(model: Any) -> Callable[[Image.Image], Tensor]:  # noqa: ANN401
    """What makes (3, height, width) pixels of a picture for a model: the whole of it, stretched."""
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    settings = {**resolve_model_data_config(model), "crop_pct": 1.0, "crop_mode": "squash"}
    made: Callable[[Image.Image], Tensor] = create_transform(**settings)
    return made


def is_plain(model: Any) -> bool:  # noqa: ANN401
    """Whether a model is a plain ViT with a class token and two blocks at least, whose attention can be watched."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import VisionTransformer

    plain = isinstance(model, VisionTransformer) and all(type(block.attn) is Attention for block in model.blocks)
    return plain and model.cls_token is not None and len(model.blocks) >= 2


def lacking(model: Any) -> str | None:  # noqa: ANN401
    """What the installed timm does not show of a plain ViT, in one sentence, or None when it shows everything."""
    owners = {"attention": model.blocks[0].attn, "model": model}
    absent = [name for name, owner in NEEDED.items() if not hasattr(owners[owner], name)]
    return f"timm {installed('timm')} has no {' and '.join(absent)} in a ViT" if absent else None


@contextmanager
def watched(attention: Any, see: Callable[[Tensor, Tensor, float], None]) -> Iterator[None]:  # noqa: ANN401
    """Shows queries, keys and the factor on the scores of every call of an attention module inside the block.

    Args:
        attention: The attention module of a block.
        see: Called with (V, H, N, D) queries, (V, H, N, D) keys and the factor.
    """
    seen: list[Tensor] = []

    def query(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output)

    def key(module: nn.Module, inputs: object, output: Tensor) -> None:
        see(seen.pop(), output, float(attention.scale))

    # The norms are called before the product, the queries' first, and also where there is nothing to normalise.
    with attention.q_norm.register_forward_hook(query), attention.k_norm.register_forward_hook(key):
        yield
