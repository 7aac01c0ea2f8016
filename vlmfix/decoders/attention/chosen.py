"""Heads that a decoder acts in: whether the model has them, where they lie, and which of a profile's are the strongest.

Shape letters (``docs/notation.md``): L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet
from vlmfix.language.parameters import HeadList
from vlmfix.models.checkpoint import Checkpoint

Head = tuple[int, int]
"""Layer and query head, from 0."""


def beyond(vlm: Checkpoint, heads: Iterable[Head]) -> str | None:
    """Says in one sentence which heads the model does not have; None when it has all."""
    outside = [(layer, head) for layer, head in heads if layer >= vlm.layers or head >= vlm.heads]
    if not outside:
        return None
    return f"heads {HeadList.of(outside)} are outside the model's {vlm.layers} layers of {vlm.heads} heads"


def marked(vlm: Checkpoint, heads: Iterable[Head]) -> Tensor:
    """Marks heads, (L, H) bool on the model's device."""
    found = torch.zeros(vlm.layers, vlm.heads, dtype=torch.bool, device=vlm.device)
    for layer, head in heads:
        found[layer, head] = True
    return found


def layers_with(heads: Tensor) -> LayerSet:
    """Returns the layers of heads that are marked, (L, H) bool."""
    return LayerSet("/".join(str(layer) for layer, some in enumerate(heads.any(dim=1).tolist()) if some))


def strongest(scores: Tensor, count: int) -> tuple[Head, ...]:
    """Returns the heads with the largest scores, (L, H), largest first, as far as these are above 0."""
    order = scores.flatten().sort(descending=True, stable=True).indices[:count].tolist()
    pairs = [divmod(place, scores.shape[1]) for place in order]
    return tuple((layer, head) for layer, head in pairs if float(scores[layer, head]) > 0)
