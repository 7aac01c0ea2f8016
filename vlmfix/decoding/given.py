"""Holds what the text decoder is called with, and cuts it to some rows and columns.

Shape letters (``docs/notation.md``): B rows, T prompt tokens, K keys; here also N rows and Q columns of a cut, U
beginnings of P tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmfix.errors import UpstreamError
from vlmfix.upstream.names import TextNames
from vlmfix.upstream.versions import say_once


@dataclass(frozen=True, eq=False)
class Given:
    """Holds the arguments that the text decoder was called with.

    Attributes:
        names: Names of the arguments.
        all: The arguments by name.
        embeds: (B, T, hidden size) embeddings.
        positions: (B, T) or (3 or 4, B, T) position ids; None when none were given.
        mask: None or (B, T) for plain causality, (B, 1, T, K), or several of these by name.
        cache: Where keys and values go, or None.
        picture_tokens: (B, T) bool, the tokens that deep features are added to, or None.
        deep: Their features, one (tokens, hidden size) for each of the first layers.
    """

    names: TextNames
    all: Mapping[str, Any]
    embeds: Tensor
    positions: Tensor | None
    mask: Any
    cache: Any
    picture_tokens: Tensor | None
    deep: Sequence[Tensor]

    def at(self, rows: Tensor, columns: Tensor) -> dict[str, Any]:
        """Selects the decoder's inputs, without mask and cache, at some tokens.

        Args:
            rows: (N, 1) int64.
            columns: (N, Q) int64.
        """
        names = self.names
        inputs = {name: value for name, value in self.all.items() if name not in (names.mask, names.cache)}
        inputs[names.embeds] = self.embeds[rows, columns]  # (N, Q, hidden size)
        inputs[names.positions] = self.places()[..., rows, columns]  # (..., N, Q)
        visual = self.picture_tokens
        if visual is not None and names.picture_tokens and names.deep:
            number = visual.flatten().cumsum(0).view_as(visual) - 1
            chosen = visual[rows, columns]
            order = number[rows, columns][chosen]
            inputs |= {names.picture_tokens: chosen, names.deep: [level[order] for level in self.deep]}
        return inputs

    def places(self) -> Tensor:
        """Returns the position ids of all rows, (B, T) or (3 or 4, B, T)."""
        if self.positions is None:
            raise RuntimeError("a pass without positions is not cut")
        return self.positions.expand(*self.positions.shape[:-2], self.embeds.shape[0], -1)


def read(decoder: nn.Module, kwargs: Mapping[str, Any]) -> Given | None:
    """Reads the arguments of a call; warns once and returns None when it does not know some of them."""
    try:
        names = TextNames.of(decoder)
    except UpstreamError as error:
        say_once(f"prompts pass whole and apart, which costs time and memory: {error}")
        return None
    own = (names.embeds, names.mask, names.positions, names.cache, names.picture_tokens, names.deep)
    if strange := [name for name, value in kwargs.items() if name not in own and _by_token(value)]:
        say_once(
            "prompts pass whole and apart, which costs time and memory: "
            f"{type(decoder).__name__} was called with {', '.join(strange)}, which vlmfix does not know"
        )
        return None
    return Given(
        names=names,
        all=kwargs,
        embeds=kwargs[names.embeds],
        positions=kwargs.get(names.positions),
        mask=kwargs.get(names.mask),
        cache=kwargs.get(names.cache),
        picture_tokens=kwargs.get(names.picture_tokens) if names.picture_tokens else None,
        deep=(kwargs.get(names.deep) or ()) if names.deep else (),
    )


def _by_token(value: Any) -> bool:  # noqa: ANN401 (whatever a model hands to its text decoder)
    """Returns whether an argument may have entries for single tokens."""
    parts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, Tensor) and part.dim() > 0 for part in parts)


def mask_among(mask: Any, rows: Tensor, columns: Tensor) -> Any:  # noqa: ANN401
    """Cuts out the mask of some rows' tokens among themselves, (U, 1, P, P); None for plain causality."""
    if isinstance(mask, dict):
        return {name: mask_among(part, rows, columns) for name, part in mask.items()}
    if mask is None or mask.dim() == 2:
        return None
    return mask[rows[:, None, None], 0, columns[:, :, None], columns[:, None, :]][:, None]


def mask_from(mask: Any, begin: int, end: int) -> Any:  # noqa: ANN401
    """Cuts out the mask of the queries from one column to another; a (B, T) mask is that of the keys.

    It returns no dict whose values are all None: the decoder would take it for a finished mask, and use no mask at
    all behind the cache.
    """
    if isinstance(mask, dict):
        parts = {name: mask_from(part, begin, end) for name, part in mask.items()}
        return parts if any(part is not None for part in parts.values()) else None
    if mask is None:
        return None
    return mask[:, :end] if mask.dim() == 2 else mask[:, :, begin:end]
