"""PAI: raises the attention of the row that predicts to the picture, and guides away from the text alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, ScoreEdit, Site
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoding.branches import Contrast, without_picture
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

ALONE = {"guidance": 1.0}
"""Where the first part acts alone."""


@dataclass(frozen=True, kw_only=True)
class PAI(Decoder):
    """Pay Attention to Image: adds to every attention score of the picture a share of its size, in rows that predict.

    Two parts. The scaled score ``e`` of an image token becomes ``e + gain * |e|`` before the softmax, in all heads of
    ``layers``. And with ``s`` and ``u`` the log-probabilities with the picture (edited) and without, the token is
    chosen by ``u + guidance * (s - u)`` among those whose probability is at least ``plausibility`` times the largest.

    Args:
        preset: ``paper`` (both parts) or ``official-code`` (which leaves the attention of the prompt as it is while the
            second part is on, so that the first token is chosen without the first part).
        gain: alpha >= 0, share of a score's size that is added.
        guidance: gamma >= 1; at 1 there is no second part, and no second row.
        plausibility: beta in [0, 1]; 0 cuts nothing. Without the second part nothing is cut.
        layers: Layers of the first part.
        first_token: Whether the first part acts on the prompt's last row.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: Liu, Zheng and Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination
    in LVLMs", ECCV 2024, arXiv 2407.21771; code LALBJ/PAI. Its README has gain 0.2 and guidance 1.1; its command line
    begins with guidance 2.

    *Differs*: with guidance 1 the released code never switches the edit on; here the first part then acts alone, with
    ``official-code`` behind the first token (without a second part at all the release edits that too, as
    ``first_token=true`` does). It has no models with grouped keys, and needs eager attention. Beams carry the second
    row along, which the release forgets.

    *Cost*: one row of attention is computed from its scores. With the second part two rows per sample, of which the
    second has a short prompt; in the cache it is as wide as the first.

    Example:
        >>> PAI(guidance=1).spec()
        'pai:preset=paper,gain=0.2,guidance=1,plausibility=0.1,layers=2:,first_token=true'
    """

    name: ClassVar[str] = "pai"
    source: ClassVar[Source] = Source(
        title="Pay Attention to Image", year=2024, arxiv="2407.21771", code="https://github.com/LALBJ/PAI"
    )
    acts_on: ClassVar[str] = "attention scores, logits of 2 branches"
    passes: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"first_token": True},
        "official-code": {"first_token": False},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="named set of parameters")
    gain: float = parameter(
        0.2, float, low=0, high=10, search=(0.02, 1.0), log=True, help="alpha, share of a score's size that is added"
    )
    guidance: float = parameter(1.1, float, low=1, high=10, search=(1.0, 2.0), help="gamma; 1: no second part")
    plausibility: float = parameter(
        0.1,
        float,
        low=0,
        high=1,
        search=(0.01, 0.5),
        log=True,
        idle=(ALONE,),
        help="beta, cut below this share of the best token",
    )
    layers: LayerSet = parameter("2:", LayerSet, help="layers of the first part")
    first_token: bool = parameter(None, bool, help="edit the prompt's last row")
    when: str = steps(ALONE)
    margin: float = lead(ALONE)

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the edit, and the branch without the picture."""
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        edit = ImageScores(layers=self.layers, gain=self.gain, first_token=self.first_token)
        if self.guidance == 1:
            return DecodingPlan(edits=(edit,))
        rule = Guidance(
            branches=(without_picture(vlm, batch),),
            rows=pictured,
            guidance=self.guidance,
            plausibility=self.plausibility,
            margin=margin_of(self.when, self.margin),
        )
        return DecodingPlan(edits=(edit,), contrasts=(rule,))


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageScores(ScoreEdit):
    """Adds to the scores of image tokens a share of their size.

    Attributes:
        gain: alpha.
        first_token: Whether it acts on the prompt's last row, or on generated tokens alone.
    """

    gain: float
    first_token: bool
    rows: ClassVar[Rows] = "last"

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Returns the raised scores, (B, H, R, K)."""
        if site.prefill and not self.first_token:
            return scores
        image = site.image_keys[:, None, None]  # (B, 1, 1, K)
        return torch.where(image, scores + self.gain * scores.abs(), scores)


@dataclass(frozen=True, eq=False, kw_only=True)
class Guidance(Contrast):
    """Pushes log-probabilities away from those of one branch, then cuts implausible tokens.

    Attributes:
        guidance: gamma.
        plausibility: beta.
    """

    guidance: float
    plausibility: float

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + (guidance - 1) * (s - u)``, cut by the clean logits."""
        away = clean.log_softmax(dim=-1) - others[0].log_softmax(dim=-1)
        return cut(clean, scores + (self.guidance - 1) * away, self.plausibility)
