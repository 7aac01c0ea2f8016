"""Blanks tokens of a prompt: the text decoder gets zeros in their places, and positions and masks stay.

Shape letters (``docs/notation.md``): R rows, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.names import TextNames


@contextmanager
def blanked(vlm: Checkpoint, blank: Tensor | None) -> Iterator[None]:
    """Blanks tokens in every pass over the prompt inside the block; passes over single tokens are left alone.

    Args:
        vlm: The model.
        blank: (R, T) bool; None blanks nothing.
    """
    if blank is None:
        yield
        return
    decoder = vlm.family.decoder(vlm.model)
    names = TextNames.of(decoder)

    def empty(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:  # noqa: ANN401
        embeds = kwargs[names.embeds]
        if embeds.shape[1] < blank.shape[1]:
            return None
        here = pad(blank, (0, embeds.shape[1] - blank.shape[1])).to(embeds.device)  # tokens behind the prompt stay
        new = kwargs | {names.embeds: embeds.masked_fill(here[..., None], 0.0)}
        if names.deep and names.picture_tokens and kwargs.get(names.deep):
            gone = here[kwargs[names.picture_tokens]]  # (picture tokens,)
            new[names.deep] = [torch.where(gone[:, None], 0.0, level) for level in kwargs[names.deep]]
        return args, new

    with decoder.register_forward_pre_hook(empty, with_kwargs=True):
        yield
