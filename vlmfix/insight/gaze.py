"""Maps the attention that patches gain while a question is read, and finds the layer that shifts most.

Shape letters (``docs/notation.md``): B rows, H query heads, R query rows, K keys, T prompt tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmfix.attention.edit import PromptReading, Site
from vlmfix.attention.session import bare, edited
from vlmfix.insight.question import asked
from vlmfix.insight.sinks import QUESTIONS, random_picture
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

DEPTH = 0.7
"""Share of the depth at which enhancement ends in models that are not in the table."""


def gaze_shift(weights: Tensor, rows: Tensor, image: Tensor, content: Tensor) -> Tensor:
    """Scores one layer's heads by the attention that patches gain at content words.

    Args:
        weights: (B, H, R, K) attention.
        rows: (R,) column of each row, ascending.
        image: (B, K) bool, image patches.
        content: (B, R) bool, rows of content words.

    Returns:
        (B, H), at least 0.
    """
    gained = weights.diff(dim=2).clamp(min=0)  # (B, H, R - 1, K)
    counts = content[:, 1:] & (rows.diff() == 1)  # (B, R - 1)
    return torch.einsum("bhrk,bk,br->bh", gained, image.to(gained.dtype), counts.to(gained.dtype))


@dataclass(frozen=True, eq=False, kw_only=True)
class GazeReading(PromptReading):
    """Makes the map of each layer during prefill.

    Attributes:
        content: (samples, T) bool, tokens of content words.
        share: Share of the heads that are averaged.
        found: Layer number -> (B, K) map.
    """

    content: Tensor
    share: float
    found: dict[int, Tensor] = field(default_factory=dict)

    def read(self, site: Site, weights: Tensor) -> None:
        """Makes and keeps the map of (B, H, R, K) weights."""
        content = pad(per_row(site, self.content), (0, weights.shape[-1] - site.prompt))  # (B, K)
        rows = site.queries[0]  # (R,)
        self.found[site.layer] = shift_map(weights, rows, site.image_keys, content[:, rows], self.share)

    def saliency(self) -> Tensor:
        """Averages the maps of all layers, (B, K)."""
        return torch.stack([found.float() for found in self.found.values()]).mean(dim=0)


def per_row(site: Site, values: Tensor) -> Tensor:
    """Spreads (samples, tokens) values to (B, T); longer contrast branches may have added columns on the left."""
    return site.spread(pad(values, (site.prompt - values.shape[1], 0)))


def shift_map(weights: Tensor, rows: Tensor, image: Tensor, content: Tensor, share: float) -> Tensor:
    """Computes the attention that patches gained at content words, in the heads that shifted most.

    Args:
        weights: (B, H, R, K) attention.
        rows: (R,) column of each row, ascending.
        image: (B, K) bool, image patches.
        content: (B, R) bool, rows of content words.
        share: Share of the heads that are averaged.

    Returns:
        (B, K) float32, at least 0; zero outside patches, and without content words.
    """
    counts = content[:, 1:] & (rows.diff() == 1)  # (B, R - 1), rows whose preceding row is among the R
    gained = weights.diff(dim=2).clamp(min=0) * image[:, None, None, :]  # (B, H, R - 1, K)
    total = torch.einsum("bhrk,br->bhk", gained, counts.to(gained.dtype))  # (B, H, K)
    kept = most(total.sum(dim=-1), share)  # (B, H)
    number = counts.sum(dim=1) * math.floor(share * weights.shape[1])  # (B,)
    return torch.einsum("bhk,bh->bk", total, kept.to(total.dtype)) / number.clamp(min=1)[:, None]


def most(values: Tensor, share: float) -> Tensor:
    """Marks the floor(share * H) heads with the largest values; of equal ones the first.

    Args:
        values: (B, H, ...).
        share: In [0, 1].

    Returns:
        (B, H, ...) bool.
    """
    heads = torch.arange(values.shape[1], device=values.device)
    earlier = (heads[None, :] < heads[:, None]).view(1, len(heads), len(heads), *[1] * (values.dim() - 2))
    own, other = values[:, :, None], values[:, None]  # (B, H, 1, ...), (B, 1, H, ...)
    ahead = (other > own) | ((other == own) & earlier)  # (B, H, H, ...)
    return ahead.sum(dim=2) < math.floor(share * values.shape[1])


def deepest(count: int) -> int:
    """Returns the last layer that is enhanced by default, of ``count`` layers."""
    return min(round(DEPTH * count), count - 1)


@torch.no_grad()
def read_apart(vlm: Checkpoint, batch: Batch, layout: ImageLayout, reading: PromptReading) -> None:
    """Runs the prompt once with nothing but a reading at work."""
    model: Any = vlm.model
    with bare(vlm), edited(vlm, layout, [reading]):
        model(**batch, use_cache=False, logits_to_keep=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftTotals(PromptReading):
    """Adds up all shifts of each layer.

    Attributes:
        content: (B, T) bool, tokens of content words.
        totals: Layer number -> sum over rows, heads, tokens and patches.
    """

    content: Tensor
    totals: dict[int, float] = field(default_factory=dict)

    def read(self, site: Site, weights: Tensor) -> None:
        """Sums over (B, H, R, K) weights."""
        rows = site.queries[0]
        self.totals[site.layer] = float(gaze_shift(weights, rows, site.image_keys, self.content[:, rows]).sum())


_PEAKS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def shift_peak(vlm: Checkpoint) -> int:
    """Finds the layer with the largest gaze shifts, among those that leave a layer to enhance; once per model."""
    if vlm.model not in _PEAKS:
        batch = vlm.encode(QUESTIONS, [[random_picture(number)] for number in range(len(QUESTIONS))])
        reading = ShiftTotals(content=asked(vlm, batch, "stop-words", last_only=False).content)
        read_apart(vlm, batch, vlm.layout(batch), reading)
        early = range(max(1, deepest(vlm.layers)))
        _PEAKS[vlm.model] = max(early, key=lambda layer: reading.totals[layer])
    return _PEAKS[vlm.model]
