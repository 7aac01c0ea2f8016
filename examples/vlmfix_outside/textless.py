"""PAI's contrast: takes away what the model would say without the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfix.extend import (
    Batch,
    Checkpoint,
    Contrast,
    Decoder,
    DecodingPlan,
    ImageLayout,
    Source,
    parameter,
    without_picture,
)


@dataclass(frozen=True, kw_only=True)
class Textless(Decoder):
    """Subtracts the logits of the same question without its picture: ``gamma * clean - (gamma - 1) * textless``.

    Args:
        gamma: Weight of the contrast, at least 1; 1 is the plain model.

    *Source*: Liu et al., "Paying More Attention to Image", ECCV 2024, arXiv 2407.21771.

    *Differs*: it is the published method's contrast without its edit of attention.

    *Cost*: two rows per sample. Beams and compiled decoding work. A row without a picture is left as it is.
    """

    name: ClassVar[str] = "textless"
    source: ClassVar[Source] = Source(title="Paying More Attention to Image", year=2024, arxiv="2407.21771")
    acts_on: ClassVar[str] = "logits of 2 branches"
    passes: ClassVar[int] = 2

    gamma: float = parameter(1.1, float, low=1, high=10, search=(1.0, 3.0), help="weight of the contrast; 1: plain")

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one branch without pictures."""
        pictured = layout.tokens.any(dim=1)  # (B,)
        if not pictured.any():
            return DecodingPlan()
        rule = Away(branches=(without_picture(vlm, batch),), rows=pictured, gamma=self.gamma)
        return DecodingPlan(contrasts=(rule,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Away(Contrast):
    """Pushes the scores away from the branch."""

    gamma: float

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + (gamma - 1) * (clean - branch)``, (B, V)."""
        return scores + (self.gamma - 1) * (clean - others[0])
