"""MoD: asks whether the picture's most regarded tokens say the same, and adds their logits or subtracts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.avisc import unseen
from vlmfix.decoders.logits.mixture import Mixture
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoding.branches import with_blanks
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, kw_only=True)
class MoD(Decoder):
    """Mixture of Decoding: contrasts only where the model looks at the wrong tokens, and else listens to them.

    In a second row all image tokens are zeros but the share ``kept`` that the row choosing the first token looks at
    most. Where that row's first distribution is nearly the clean one (Jensen-Shannon divergence below ``agreement``),
    the attended tokens hold the answer, and their logits are added for the whole answer:
    ``clean + complement * other``. Elsewhere they are subtracted: ``(1 + contrast) * clean - contrast * other``. Then
    tokens whose clean probability is below ``plausibility`` times the largest are cut.

    Args:
        kept: Share of the image tokens that the second row sees, in (0, 1].
        agreement: Divergence in nats below which both agree.
        complement: Weight of the second row's logits where they agree.
        contrast: Weight of the contrast elsewhere.
        plausibility: beta in [0, 1]; 0 cuts nothing.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: Chen et al., "Mixture of Decoding: An Attention-Inspired Adaptive Decoding Strategy to Mitigate
    Hallucinations in Large Vision-Language Models", Findings of ACL 2025, arXiv 2505.17061; code xlchen0205/MoD, whose
    script for captions has these values.

    *Differs*: the released code takes one row and draws tokens; here each row has its mode, and greedy search and beams
    work.

    *Cost*: the prompt once more to find the tokens, and two rows per sample, one pass per token.

    Example:
        >>> MoD(kept=0.1).spec()
        'mod:kept=0.1,agreement=0.05,complement=4,contrast=1,plausibility=0.5'
    """

    name: ClassVar[str] = "mod"
    source: ClassVar[Source] = Source(
        title="Mixture of Decoding", year=2025, arxiv="2505.17061", code="https://github.com/xlchen0205/MoD"
    )
    acts_on: ClassVar[str] = "logits of 2 branches"
    passes: ClassVar[int] = 2
    compiles: ClassVar[bool] = False

    kept: float = parameter(0.2, float, low=0, high=1, search=(0.05, 0.5), help="share of image tokens that are left")
    agreement: float = parameter(
        0.05, float, low=0, high=1, search=(0.01, 0.3), log=True, help="divergence below which both rows agree"
    )
    complement: float = parameter(4.0, float, low=0, high=20, search=(0.5, 6.0), help="weight where they agree")
    contrast: float = parameter(1.0, float, low=0, high=10, search=(0.05, 2.0), log=True, help="weight elsewhere")
    plausibility: float = parameter(
        0.5, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )
    when: str = steps()
    margin: float = lead()

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one branch that sees the most regarded tokens, for rows that have a picture."""
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        blank = unseen(vlm, batch, layout, lambda seen: most_regarded(seen.double().sum(dim=0), self.kept))
        rule = Mixture(
            branches=(with_blanks(batch, blank),),
            rows=pictured,
            agreement=self.agreement,
            complement=self.complement,
            contrast=self.contrast,
            plausibility=self.plausibility,
            margin=margin_of(self.when, self.margin),
        )
        return DecodingPlan(contrasts=(rule,))


def most_regarded(seen: Tensor, share: float) -> Tensor:
    """Marks the share of (N,) values that are highest, rounded up as in the released code, one at least, (N,) bool."""
    count = max(1, len(seen) - int(len(seen) * (1 - share)))
    return torch.zeros_like(seen, dtype=torch.bool).scatter(0, seen.topk(count).indices, True)
