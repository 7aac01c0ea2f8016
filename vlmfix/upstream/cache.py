"""Caches of keys and values: which kind one is, and what is done to it between two passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from vlmfix.upstream.names import name_of
from vlmfix.upstream.versions import missing


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
    plain = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer, RoomyLayer)
    for layer in list[Any](cache.layers):  # a subclass of somebody else's may hold keys and values otherwise
        window = _window(layer)
        if type(layer) not in plain or (layer.is_sliding and (window is None or window <= prompt)):
            return False
    return True


def is_written_through(cache: Cache) -> bool:
    """Whether what attention is given of a cache is the cache's own memory, so that writing there changes the cache."""
    own = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer, RoomyLayer, FixedLayer)
    plain = type(cache) in (DynamicCache, StaticCache) and not getattr(cache, "offloading", False)
    return plain and all(type(layer) in own for layer in cache.layers)


def can_step_back(cache: Cache | None) -> bool:
    """Whether a cache is dynamic, with layers that can give back their last token before a window is full."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def drop_last(cache: Cache) -> None:
    """Takes a cache's last token back.

    Raises:
        UpstreamError: The cache did not become one token shorter.
    """
    before = length(cache)
    cache.crop(-1)
    if length(cache) != before - 1:
        raise missing(f"crop(-1) leaves {length(cache)} of {before} tokens in a cache")


def rearrange(cache: Cache, columns: Tensor) -> None:
    """Makes a dynamic cache's rows of some of their columns; no window may be full.

    Args:
        cache: The cache, of B rows.
        columns: (B, K) int64, which columns each row has from now on; no more than before.

    Raises:
        UpstreamError: The cache does not hold K tokens afterwards.
    """
    fewer = columns.shape[1] - length(cache)
    for layer in list[Any](cache.layers):
        if not layer.is_initialized:
            continue
        wanted = torch.nn.functional.pad(columns, (0, -fewer)).to(layer.keys.device)[:, None, :, None]
        layer.keys, layer.values = (
            x.gather(2, wanted.expand(-1, x.shape[1], -1, x.shape[3])) for x in (layer.keys, layer.values)
        )
    cache.crop(fewer)
    if length(cache) != columns.shape[1]:
        raise missing(f"crop({fewer}) leaves {length(cache)} tokens in a cache, and not {columns.shape[1]}")


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
    """Lets a cache reorder more rows than beam search knows of, or tell of their order, until ``restore``.

    Args:
        cache: The cache; its ``reorder_cache`` is shadowed on the instance.
        rows: Turns the (B,) rows that beam search chose into those of the whole cache; called once for each order.
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
        if self.keys is None or self.values is None:
            raise RuntimeError("the shared prompt was reset")
        return _behind(self.keys, key_states), _behind(self.values, value_states)


def _behind(former: Tensor, new: Tensor) -> Tensor:
    """Keys or values of new tokens behind former ones, (1 or B, G, K, D), which are copied: (B, G, K + Q, D)."""
    return torch.cat([former.expand(len(new), -1, -1, -1), new], dim=2)


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


class Arena:
    """Memory for the keys and values of a model's layers, which calls use one after the other.

    Attributes:
        moved: How often some of it was given anew: what was recorded over the former memory is void.
    """

    def __init__(self) -> None:
        self.moved = 0
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def part(self, layer: int, keys: Tensor, values: Tensor, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Memory for a layer, (rows, G, capacity, D) keys and values; what stood in it may still stand there.

        Args:
            layer: Number of the layer.
            keys: (B, G, Q, D), of the kind that it is to hold.
            values: (B, G, Q, D).
            rows: Rows, B or more.
            capacity: Tokens.
        """
        held = self._held.get(layer)
        if held is None or not (_fits(held[0], keys, rows, capacity) and _fits(held[1], values, rows, capacity)):
            held = None
            self._held.pop(layer, None)  # before the new one is taken
            self.moved += 1
            # One token more than is ever seen: what compiled functions read is then part of something from the first
            # time on, and they are not compiled anew when a shorter part is read.
            self._held[layer] = _room(keys, rows, capacity + 1), _room(values, rows, capacity + 1)
        keys, values = self._held[layer]
        return keys[:rows, :, :capacity], values[:rows, :, :capacity]

    def fixed(self, rows: int, capacity: int, column: Tensor) -> DynamicCache:
        """A cache over what it holds whose passes write one token at a column, and see the whole capacity.

        Args:
            rows: Rows of the passes.
            capacity: Keys that they see.
            column: (1,) int64; where the token is written, read by each pass from the same memory.
        """
        cache = DynamicCache()
        for _, (keys, values) in sorted(self._held.items()):
            cache.layers.append(FixedLayer(keys[:rows, :, :capacity], values[:rows, :, :capacity], column))
        return cache


def _fits(held: Tensor, wanted: Tensor, rows: int, capacity: int) -> bool:
    same = (held.dtype, held.device, held.shape[1], held.shape[3])
    return same == (wanted.dtype, wanted.device, wanted.shape[1], wanted.shape[3]) and (
        held.shape[0] >= rows and held.shape[2] >= capacity
    )


def _room(like: Tensor, rows: int, capacity: int) -> Tensor:
    return like.new_zeros(rows, like.shape[1], capacity, like.shape[3])  # a key that is masked must be a number


class RoomyLayer(DynamicLayer):
    """One layer of a cache that has room for the tokens to come, so that a new one is written and nothing is copied.

    Args:
        arena: Where the memory comes from.
        number: The layer.
        rows: Rows that there is room for.
        capacity: Tokens that there is room for; when they are used up it takes ``more``.
        more: Tokens.
    """

    def __init__(self, arena: Arena, number: int, rows: int, capacity: int, more: int) -> None:
        super().__init__()
        self._arena, self._number, self._rows = arena, number, rows
        self._capacity, self._more = capacity, more
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes (B, G, Q, D) keys and values behind those that stand there, and returns all, (B, G, K, D)."""
        before = self.get_seq_length()
        end = before + key_states.shape[2]
        if self._room is None or end > self._capacity:
            self._make_room(key_states, value_states, before, end)
        both = []
        for room, new in zip(self._room or (), (key_states, value_states), strict=True):
            room[: len(new), :, before:end] = new.detach()
            both.append(room[: len(new), :, :end])
        self.keys, self.values = both
        self.device, self.is_initialized = self.keys.device, True
        if key_states.requires_grad or value_states.requires_grad:
            return _behind(self.keys[:, :, :before], key_states), _behind(self.values[:, :, :before], value_states)
        return self.keys, self.values

    def _make_room(self, keys: Tensor, values: Tensor, before: int, end: int) -> None:
        former = [x.clone() for x in (self.keys, self.values) if x is not None]
        while self._capacity < end:
            self._capacity += self._more
        self._room = self._arena.part(self._number, keys, values, max(self._rows, len(keys)), self._capacity)
        for room, old in zip(self._room, former, strict=False):
            room[: len(old), :, :before] = old

    def grow(self, tokens: int) -> None:
        """Takes note that as many tokens stand in its room, which others have written."""
        if self._room is not None:
            rows = 0 if self.keys is None else len(self.keys)
            self.keys, self.values = (room[:rows, :, :tokens] for room in self._room)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Goes on with some of the rows, in the order given."""
        if self._room is not None and self.keys is not None and self.values is not None:
            # apart: rows may be written over each other
            kept = [old.index_select(0, beam_idx.to(old.device)) for old in (self.keys, self.values)]
            if len(beam_idx) > len(self._room[0]):
                self._rows = len(beam_idx)
                self._room = self._arena.part(self._number, kept[0], kept[1], self._rows, self._capacity)
            for room, values in zip(self._room, kept, strict=True):
                room[: len(values), :, : values.shape[2]] = values
            self.keys, self.values = (room[: len(beam_idx), :, : kept[0].shape[2]] for room in self._room)

    def reserve(self, rows: int, capacity: int) -> None:
        """Sees to it that there is room for rows and tokens, with zeros where no row or token is yet."""
        if self._room is None or self.keys is None or self.values is None:
            raise RuntimeError("no prompt has passed")
        count, _, tokens, _ = self.keys.shape
        if len(self._room[0]) < rows or self._room[0].shape[2] < capacity:
            self._rows, self._capacity = max(rows, self._rows), max(capacity, self._capacity)
            self._make_room(self.keys, self.values, tokens, tokens)
            self.grow(tokens)
        for room in self._room:
            room[:rows, :, tokens:capacity].zero_()
            room[count:rows, :, :capacity].zero_()


class FixedLayer(DynamicLayer):
    """One layer of a cache whose passes write one token at a column that stands in memory.

    Args:
        keys: (B, G, K, D), written into.
        values: (B, G, K, D), written into.
        column: (1,) int64.
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._column = keys, values, column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the (B, G, 1, D) keys and values, and returns all, (B, G, K, D)."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise RuntimeError("the recorded step's cache was reset")
        column = self._column.to(keys.device)
        keys.index_copy_(2, column, key_states.detach())
        values.index_copy_(2, column, value_states.detach())
        if (
            key_states.requires_grad or value_states.requires_grad
        ):  # what is in memory is constant, the new token is not
            return keys.index_copy(2, column, key_states), values.index_copy(2, column, value_states)
        return keys, values


def roomy(model: PreTrainedModel, arena: Arena, rows: int, capacity: int, more: int) -> DynamicCache:
    """An empty cache like ``fresh``, with room in an arena; without it where some layer has a window.

    Args:
        model: The model.
        arena: Where the memory comes from.
        rows: Rows that there is room for.
        capacity: Tokens that there is room for.
        more: How many more are taken when they are used up.
    """
    cache = fresh(model)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        count = range(len(cache.layers))
        cache.layers = [RoomyLayer(arena, number, rows, capacity, more) for number in count]
    return cache


def of_rows(cache: Cache, rows: Tensor, more: int) -> DynamicCache:
    """A dynamic cache, or one of ``roomy``, with copies of some rows of another, which stays as it is.

    Args:
        cache: The other.
        rows: (B,) int64, which of its rows.
        more: Tokens that there is room for behind those that it holds, where it reserves room.
    """
    apart = DynamicCache()
    if is_roomy(cache):
        arena = Arena()
        count = range(len(cache.layers))
        apart.layers = [RoomyLayer(arena, number, len(rows), length(cache) + more, more) for number in count]
        for number, (keys, values) in enumerate(keys_and_values(cache)):
            fill(apart, number, keys[rows], values[rows])
        return apart
    apart.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in list[Any](apart.layers):
        layer.reorder_cache(rows)
    return apart


def is_roomy(cache: Cache) -> bool:
    """Whether a cache is one of ``roomy`` with room in an arena."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def room_of(cache: Cache) -> list[RoomyLayer]:
    """The layers of a cache with room in an arena."""
    return [layer for layer in cache.layers if isinstance(layer, RoomyLayer)]


def fresh(model: PreTrainedModel) -> DynamicCache:
    """An empty dynamic cache with the layers, windows included, that the model's text decoder has."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))
