"""Caches of keys and values: which kind one is, and what is done to it between two passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from vlmfix.upstream.names import name_of
from vlmfix.upstream.versions import missing

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
"""Cache layers that hold plain keys and values; a subclass may hold them otherwise."""


def handed_over(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The argument that gives a model, or its ``generate``, a cache.

    Raises:
        UpstreamError: The model takes a cache under no known name.
    """
    return {name_of(type(model), "cache"): cache}


def returned(model: PreTrainedModel, output: Any) -> Cache:  # noqa: ANN401 (families differ)
    """The cache that a model's pass returned.

    Raises:
        UpstreamError: It has none under a known name.
    """
    cache: Cache | None = getattr(output, name_of(type(model), "cache"), None)
    if cache is None:
        raise missing(f"{type(output).__name__} has no cache under the name by which {type(model).__name__} takes one")
    return cache


def length(cache: Cache) -> int:
    """Tokens in a cache."""
    return int(cache.get_seq_length())


def is_static(cache: Cache) -> bool:
    """Whether a cache has a fixed capacity, so that decoding steps over it can be compiled."""
    return bool(cache.is_compileable)


def mask_width(cache: Cache) -> int:
    """Keys that a decoding step over a cache sees: its capacity when it is static, else its tokens and the new one."""
    return int(cache.get_max_length()) if is_static(cache) else length(cache) + 1


def capacities(cache: Cache) -> tuple[int, int]:
    """The largest capacity of a static cache's layers, and the smallest among its sliding ones (the same without any).

    Raises:
        UpstreamError: The layers do not say how much they hold.
    """
    layers: list[Any] = list(cache.layers)
    if not all(hasattr(layer, "max_cache_len") and hasattr(layer, "is_sliding") for layer in layers):
        raise missing("layers of a static cache have no max_cache_len and is_sliding")
    most = max(layer.max_cache_len for layer in layers)
    return most, min((layer.max_cache_len for layer in layers if layer.is_sliding), default=most)


def is_plain(cache: Cache | None, prompt: int) -> bool:
    """Whether a cache is dynamic or static and all its layers keep every key of a prompt of so many tokens."""
    if cache is None or type(cache) not in (DynamicCache, StaticCache):
        return False
    for layer in list[Any](cache.layers):
        window = _window(layer)
        if type(layer) not in PLAIN or (layer.is_sliding and (window is None or window <= prompt)):
            return False
    return True


def can_step_back(cache: Cache | None) -> bool:
    """Whether a cache is dynamic, with layers that can give back their last token before a window is full."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def smallest_window(cache: Cache) -> int | None:
    """Keys that the narrowest sliding layer of a dynamic cache keeps; None without such a layer.

    Raises:
        UpstreamError: A sliding layer does not say how many.
    """
    windows = [_window(layer) for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    known = [window for window in windows if window is not None]
    if len(known) < len(windows):
        raise missing("sliding layers of a dynamic cache have no sliding_window")
    return min(known, default=None)


def drop_last(cache: Cache) -> None:
    """Takes a cache's last token back.

    Raises:
        UpstreamError: The cache did not become one token shorter.
    """
    before = length(cache)
    cache.crop(-1)
    if length(cache) != before - 1:
        raise missing(f"crop(-1) leaves {length(cache)} of {before} tokens in a cache")


def detach(cache: Cache) -> None:
    """Cuts a dynamic cache's keys and values off the graph of the passes that made them."""
    for layer in list[Any](cache.layers):
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def keys_and_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer, (B, G, K, D) each; K is the capacity of a static cache."""
    return [(layer.keys, layer.values) for layer in list[Any](cache.layers)]


def fill(cache: Cache, layer: int, keys: Tensor, values: Tensor) -> None:
    """Appends (B, G, Q, D) keys and values to a layer."""
    cache.update(keys, values, layer)


class Reordered:
    """Lets a cache reorder more rows than beam search knows of, until ``restore``.

    Args:
        cache: The cache; its ``reorder_cache`` is shadowed on the instance.
        rows: Turns the (B,) rows that beam search chose into those of the whole cache.
    """

    def __init__(self, cache: Any, rows: Callable[[Tensor], Tensor]) -> None:  # noqa: ANN401 (a method is shadowed)
        self._cache = cache
        original = cache.reorder_cache

        def reorder(beams: Tensor) -> None:
            original(rows(beams))

        cache.reorder_cache = reorder

    def restore(self) -> None:
        """Gives the cache its own method back."""
        self._cache.__dict__.pop("reorder_cache", None)


class SharedLayer(DynamicLayer):
    """One layer of a cache whose prompt all rows have in common: it is stored once and copied layer by layer.

    What a pass adds is used in that pass and not kept.

    Args:
        keys: (1, G, K, D).
        values: (1, G, K, D).
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt and of the new tokens, (B, G, K + Q, D) each."""
        return self._behind(self.keys, key_states), self._behind(self.values, value_states)

    def _behind(self, prompt: Tensor | None, new: Tensor) -> Tensor:
        if prompt is None:
            raise RuntimeError("the shared prompt was reset")
        return torch.cat([prompt.expand(len(new), -1, -1, -1), new], dim=2)  # (B, G, K + Q, D)


def shared_prompt(cache: Cache, row: int, length: int) -> DynamicCache:
    """A cache for any number of rows that all continue one row's first columns.

    Args:
        cache: Keys and values of a batch.
        row: The row.
        length: Columns to take over, padding included.
    """
    shared = DynamicCache()
    shared.layers = [
        SharedLayer(keys[row : row + 1, :, :length], values[row : row + 1, :, :length])
        for keys, values in keys_and_values(cache)
    ]
    return shared


def _window(layer: Any) -> int | None:  # noqa: ANN401 (cache layers differ)
    window: int | None = getattr(layer, "max_cache_len", getattr(layer, "sliding_window", None))
    return window


def fresh(model: PreTrainedModel) -> DynamicCache:
    """An empty dynamic cache with the layers, windows included, that the model's text decoder has."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def preallocated(model: PreTrainedModel, cache: Cache, capacity: int) -> StaticCache:
    """A static cache with the keys and values of a dynamic one, and room for more.

    Args:
        model: The model.
        cache: A dynamic cache without sliding layers.
        capacity: Tokens that it holds.
    """
    static = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=capacity)
    for number, (keys, values) in enumerate(keys_and_values(cache)):
        fill(static, number, keys, values)
    return static


def counters(cache: StaticCache) -> list[Tensor]:
    """The tensors in which the layers of a filled static cache count their tokens, and which a pass changes.

    Raises:
        UpstreamError: They count otherwise.
    """
    found = [getattr(layer, "cumulative_length", None) for layer in list[Any](cache.layers)]
    known = [counter for counter in found if isinstance(counter, Tensor)]
    if len(known) < len(found):
        raise missing("layers of a static cache have no tensor cumulative_length, so its steps are not recorded")
    return known


def shortened(model: PreTrainedModel, cache: StaticCache, rows: Tensor, tokens: int) -> DynamicCache:
    """A dynamic cache with the first tokens of some rows of a static one, (R,) int64."""
    dynamic = fresh(model)
    for number, (keys, values) in enumerate(keys_and_values(cache)):
        fill(dynamic, number, keys[rows, :, :tokens], values[rows, :, :tokens])
    return dynamic


def has_windows(cache: Cache) -> bool:
    """Whether some layer of a dynamic cache keeps its last tokens alone."""
    return any(bool(layer.is_sliding) for layer in list[Any](cache.layers))
