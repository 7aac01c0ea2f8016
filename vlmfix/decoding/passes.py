"""The model's passes of one call: the prompt's, and one for every further token.

The cache, the mask and the positions belong to the call and are handed to the model's public ``forward``. Shape letters
(``docs/notation.md``): R rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoding.graphs import AFTER, ROOM, Recorded
from vlmfix.decoding.rows import Rows
from vlmfix.errors import UpstreamError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream import cache as caches
from vlmfix.upstream.names import name_of
from vlmfix.upstream.versions import say_once

RECORDING = ("cuda",)
"""Kinds of devices on which steps are recorded."""


class Passes:
    """The passes over the rows of one call, in order: ``prompt`` once, then ``token`` as often as wanted.

    Args:
        vlm: The model; edits that are at work act in these passes.
        rows: The rows.
        room: Longest answer in tokens.
        held: Gives what edits know of the rows, which a recorded step reads; None to record no step.
    """

    def __init__(self, vlm: Checkpoint, rows: Rows, room: int, held: Callable[[], object] | None) -> None:
        self._model: Any = vlm.model
        taken = ("ids", "positions", "mask", "cache")
        self._names = [name_of(type(vlm.model), value) for value in taken]
        self._rows = rows
        self._held = held if rows.ids.device.type in RECORDING else None
        self._left, self._steps = room, 0
        self._recorded: Recorded | None = None
        self._cache: Any = caches.fresh(vlm.model)
        self._mask = rows.mask  # (R, T + tokens so far)
        self._next = rows.positions[..., -1:]  # (R, 1) or (3 or 4, R, 1), that of the newest token

    @property
    def recorded(self) -> bool:
        """Whether the newest token passed in a recorded step, in which no edit is called."""
        return self._recorded is not None

    def prompt(self) -> Tensor:
        """The logits that follow each prompt, (R, V) float32."""
        rows = self._rows
        return self._logits(rows.ids, rows.positions, self._mask, self._cache, **rows.types, **rows.pictures)

    def token(self, tokens: Tensor) -> Tensor:
        """The logits that follow a further token of each row, (R, V) float32.

        Args:
            tokens: (R,) int64.
        """
        self._left, self._steps = self._left - 1, self._steps + 1
        if self._recorded is not None and self._recorded.full:
            self._go_on_unrecorded(self._recorded)
        if self._recorded is None and self._held is not None and self._steps > AFTER and self._left > AFTER:
            self._record()
        if self._recorded is not None:
            return self._recorded.token(tokens)
        self._next = self._next + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._logits(tokens[:, None], self._next, self._mask, self._cache)

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows, in the order given; the caller sees to edits.

        Args:
            rows: (R',) int64, numbers of the present rows.
        """
        if self._recorded is not None:
            if not self._recorded.keep(rows):
                self._go_on_unrecorded(self._recorded)
            return
        self._cache.reorder_cache(rows)
        self._mask, self._next = self._mask[rows], self._next[..., rows, :]

    def _go_on_unrecorded(self, recorded: Recorded) -> None:
        self._cache, self._mask, self._next = recorded.given_back()
        self._recorded = None

    def _record(self) -> None:
        held, self._held = self._held, None
        if held is None or caches.has_windows(self._cache):
            return
        room = min(self._left + 1, ROOM)
        try:
            self._recorded = Recorded(self._model, self._logits, self._cache, self._mask, self._next, room, held())
        except (UpstreamError, RuntimeError) as error:
            say_once(f"decoding steps are not recorded as CUDA graphs, which costs time: {error}")
            return
        self._held, self._cache = held, None  # its keys and values stand in the recorded step's own cache

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: object, **given: Any) -> Tensor:
        given |= dict(zip(self._names, (ids, positions, mask, cache), strict=True))
        output = self._model(**given, use_cache=True, logits_to_keep=1, return_dict=True)
        logits: Tensor = output.logits[:, -1].float()
        return logits
