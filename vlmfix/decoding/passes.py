"""The model's passes of one call: the prompt's, and one for every further token.

The cache, the mask and the positions belong to the call and are handed to the model's public ``forward``. Shape letters
(``docs/notation.md``): R rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfix.decoding.rows import Rows
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream import cache as caches
from vlmfix.upstream.features import handed_over
from vlmfix.upstream.names import ModelNames


class Passes:
    """The passes over the rows of one call, in order: ``prompt`` once, then ``token`` as often as wanted.

    Args:
        vlm: The model; edits that are at work act in these passes.
        rows: The rows.
    """

    def __init__(self, vlm: Checkpoint, rows: Rows) -> None:
        self._model: Any = vlm.model
        self._names = ModelNames.of(vlm.model)
        self._rows = rows
        self._cache = caches.fresh(vlm.model)
        self._mask = rows.mask  # (R, T + tokens so far)
        self._next = rows.positions[..., -1:]  # (R, 1) or (3 or 4, R, 1), that of the newest token

    def prompt(self) -> Tensor:
        """The logits that follow each prompt, (R, V) float32."""
        rows = self._rows
        pictures = {} if rows.features is None else handed_over(self._model, rows.features)
        return self._logits(rows.ids, rows.positions, **rows.types, **pictures)

    def token(self, tokens: Tensor) -> Tensor:
        """The logits that follow a further token of each row, (R, V) float32.

        Args:
            tokens: (R,) int64.
        """
        self._next = self._next + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._logits(tokens[:, None], self._next)

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows, in the order given; the caller sees to edits.

        Args:
            rows: (R',) int64, numbers of the present rows.
        """
        self._cache.reorder_cache(rows)
        self._mask, self._next = self._mask[rows], self._next[..., rows, :]

    def _logits(self, ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
        names = self._names
        given |= {names.ids: ids, names.positions: positions, names.mask: self._mask, names.cache: self._cache}
        output = self._model(**given, use_cache=True, logits_to_keep=1, return_dict=True)
        logits: Tensor = output.logits[:, -1].float()
        return logits
