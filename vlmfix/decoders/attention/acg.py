"""ACG: pushes each head's output away from what it would be without the picture, inside attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, Site, SplitEdit
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

LEAST_OTHER = 1e-4
"""Attention to all but the picture below which a head's output without the picture would be noise."""


def _along(effect: Tensor, direction: Tensor, over: tuple[int, ...]) -> Tensor:
    """Projects one tensor onto another, with inner products over some axes."""
    inner = (effect * direction).sum(dim=over, keepdim=True)
    size = direction.square().sum(dim=over, keepdim=True)
    return inner / size.clamp(min=torch.finfo(size.dtype).tiny) * direction


@dataclass(frozen=True, kw_only=True)
class ACG(Decoder):
    """Attention-space contrastive guidance: adds to a head's output a multiple of what the picture alone changes in it.

    In the row that predicts, with ``o`` a head's output and ``o'`` what it would be if the row did not see the picture
    (the same scores, renormalised): ``o + strength * d``, where d is the part of ``o - o'`` that is orthogonal to
    ``o'``. Both outputs come of one row of attention, ``o' = (o - p) / (1 - m)`` with the picture's part p of the
    output and its mass m, so there is no second pass.

    Args:
        strength: gamma >= 0. The authors take 2.4 for LLaVA-1.5, 1.4 for Qwen-VL and 0.3 for MiniGPT-4; beyond that
            answers get short.
        layers: Layers to act in; the authors' fast form has the first eight (``:8``).
        orthogonal: Whether only the orthogonal part is added.
        per: ``head`` or ``layer``: over what the inner product of the projection runs.

    *Source*: "Attention-space contrastive guidance", CVPR 2026, arXiv 2601.13707; there is no released code, and the
    paper was read in a detailed account of it.

    *Differs*: the account does not say over what the projection runs; ``per`` is open, heads by default. A head that
    gives nearly all of its attention to the picture (all but 1e-4) is left alone.

    *Cost*: one row of attention is computed from its weights, and its output twice.

    Example:
        >>> ACG(layers=":8").spec()
        'acg:strength=2.4,layers=:8,orthogonal=true,per=head'
    """

    name: ClassVar[str] = "acg"
    source: ClassVar[Source] = Source(title="Attention-space contrastive guidance", year=2026, arxiv="2601.13707")
    acts_on: ClassVar[str] = "head outputs"

    strength: float = parameter(2.4, float, low=0, high=100, search=(0.1, 4.0), log=True, help="gamma, of the guidance")
    layers: LayerSet = parameter("all", LayerSet, help="layers to act in")
    orthogonal: bool = parameter(True, bool, help="add only what is orthogonal to the output without the picture")
    per: str = parameter(
        "head",
        str,
        choices=("head", "layer"),
        idle=({"orthogonal": False},),
        help="over what the projection's product runs",
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the row that predicts."""
        edit = Guided(layers=self.layers, strength=self.strength, orthogonal=self.orthogonal, heads=self.per == "head")
        return DecodingPlan(edits=(edit,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Guided(SplitEdit):
    """Adds a multiple of the picture's effect.

    Attributes:
        strength: gamma.
        orthogonal: Whether the effect's part along the output without the picture is left out.
        heads: Whether that is done for each head, or for all of a layer together.
    """

    strength: float
    orthogonal: bool
    heads: bool
    rows: ClassVar[Rows] = "last"

    def keys(self, site: Site) -> Tensor:
        """Returns the image tokens, (B, K)."""
        return site.image_keys

    def output(self, site: Site, whole: Tensor, part: Tensor, mass: Tensor) -> Tensor:
        """Returns the guided outputs, (B, H, R, D)."""
        rest = 1 - mass
        without = (whole - part) / rest.clamp(min=LEAST_OTHER)
        effect = whole - without
        if self.orthogonal:
            effect = effect - _along(effect, without, over=(-1,) if self.heads else (1, -1))
        return torch.where((mass > 0) & (rest >= LEAST_OTHER), whole + self.strength * effect, whole)
