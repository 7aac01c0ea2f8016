"""Lets edits' memory of each beam follow the beams of the model's own ``generate``, which knows of its cache alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlmfix.attention.session import AtWork
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.cache import Reordered, length
from vlmfix.upstream.names import handed


@contextmanager
def following(vlm: Checkpoint, work: AtWork) -> Iterator[None]:
    """Reorders edits' memory of their steps with the cache of every call of ``generate`` inside the block.

    Args:
        vlm: The model.
        work: The edits at work on it.
    """
    followed: list[Reordered] = []

    def follow(model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        cache = handed("cache", kwargs)
        if cache is not None and length(cache) == 0:
            followed.append(Reordered(cache, work.reorder))

    hook = vlm.model.register_forward_pre_hook(follow, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for cache in followed:
            cache.restore()
