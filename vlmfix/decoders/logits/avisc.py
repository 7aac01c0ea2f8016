"""AvisC: contrasts the logits with those that the model has when it sees only what it stares at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoders.logits.vcd import ImageContrast
from vlmfix.decoders.picture.probing import attention_maps
from vlmfix.decoding.branches import with_blanks
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


def blind(seen: Tensor, layer_share: float, deviations: float) -> Tensor:
    """Marks the tokens that draw attention whatever is asked.

    Args:
        seen: (L, N) attention of one row to N image tokens, mean over heads.
        layer_share: gamma.
        deviations: lambda.

    Returns:
        (N,) bool.
    """
    seen = seen.double()
    shares, order = (seen.sum(dim=1) / seen.sum()).sort(descending=True)
    enough = int((shares.cumsum(dim=0) < layer_share).sum()) + 1  # the fewest that reach it
    mean = seen[order[:enough]].mean(dim=0)
    spread = mean.std() if len(mean) > 1 else mean.new_zeros(())
    return mean >= mean.mean() + deviations * spread


@dataclass(frozen=True, kw_only=True)
class AvisC(Decoder):
    """Attentional Vision Calibration: subtracts the logits under a picture of which only blind tokens are left.

    Blind tokens draw attention whatever is asked. They are found once, in the row that chooses the first token: of the
    layers that look most at the picture, as many as give ``layer_share`` of all its attention, the mean over heads; a
    token whose share is at least ``deviations`` standard deviations above the picture's mean is blind. All other
    image tokens are zeros in the second row: ``scores = (1 + contrast) * clean - contrast * blind``, then tokens whose
    clean probability is below ``plausibility`` times the largest are cut.

    Args:
        preset: ``questions`` (contrast 1, as the released scripts for POPE and MME) or ``captions`` (2.5, AMBER and
            LLaVA-Bench).
        contrast: alpha >= 0, weight of the contrast.
        plausibility: beta in [0, 1]; 0 cuts nothing.
        layer_share: gamma in [0, 1], of the picture's attention over all layers.
        deviations: lambda, standard deviations above the mean from which on a token is blind.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: Woo et al., "Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language
    Models", Findings of ACL 2025, arXiv 2405.17820; code sangminwoo/AvisC.

    *Differs*: the released code sums over the batch and keeps one set of tokens for all rows; here each row has its
    own. Blanked tokens are zeros (the code also offers ones and noise), and where it has no number in its branch it
    falls back on the clean logits, which an answer from such scores here says of itself.

    *Cost*: the prompt once more to find the tokens, and two rows per sample, one pass per token.

    Example:
        >>> AvisC(preset="captions").spec()
        'avisc:preset=captions,contrast=2.5,plausibility=0.1,layer_share=0.5,deviations=1'
    """

    name: ClassVar[str] = "avisc"
    source: ClassVar[Source] = Source(
        title="Attentional Vision Calibration",
        year=2025,
        arxiv="2405.17820",
        code="https://github.com/sangminwoo/AvisC",
    )
    acts_on: ClassVar[str] = "logits of 2 branches"
    passes: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "questions": {"contrast": 1.0},
        "captions": {"contrast": 2.5},
    }

    preset: str = parameter("questions", str, choices=("questions", "captions"), help="whose contrast")
    contrast: float = parameter(
        None, float, low=0, high=10, search=(0.05, 3.0), log=True, help="alpha, weight of the contrast"
    )
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )
    layer_share: float = parameter(0.5, float, low=0, high=1, search=(0.2, 0.9), help="gamma, share of the layers")
    deviations: float = parameter(
        1.0, float, low=-10, high=10, search=(0.0, 2.0), help="lambda, from which on a token is blind"
    )
    when: str = steps()
    margin: float = lead()

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one branch that sees blind tokens alone, for rows that have a picture."""
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        blank = unseen(vlm, batch, layout, lambda seen: blind(seen, self.layer_share, self.deviations))
        rule = ImageContrast(
            branches=(with_blanks(batch, blank),),
            rows=pictured,
            contrast=self.contrast,
            plausibility=self.plausibility,
            margin=margin_of(self.when, self.margin),
        )
        return DecodingPlan(contrasts=(rule,))


def unseen(vlm: Checkpoint, batch: Batch, layout: ImageLayout, chosen: Callable[[Tensor], Tensor]) -> Tensor:
    """Marks the image tokens that a second row is not to see, (B, T) bool.

    Args:
        vlm: The model.
        batch: The clean rows, which are read once.
        layout: Where their image tokens are.
        chosen: Given (L, N) attention to a row's N image tokens, of the row that predicts and mean over heads, returns
            which of these the second row sees, (N,) bool.
    """
    looks = attention_maps(vlm, batch, LayerSet("all"))  # (1, L, T) each
    blank = torch.zeros_like(layout.tokens)
    for row, own in enumerate(layout.tokens):
        if bool(own.any()):
            blank[row, own] = ~chosen(looks[row][0].to(own.device)[:, own])
    return blank
