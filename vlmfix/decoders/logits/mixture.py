"""Adds another row's logits where it agrees with the clean one about the first token, and subtracts them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.logits.dola import distances
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoding.branches import Contrast


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixture(Contrast):
    """Adds one branch's logits to the scores or pushes them away, as its first distribution says.

    Attributes:
        agreement: Divergence in nats.
        complement: Weight where rows agree.
        contrast: Weight elsewhere.
        plausibility: beta.
        agreed: (B,) bool, which rows did, once the first token has passed.
    """

    agreement: float
    complement: float
    contrast: float
    plausibility: float
    agreed: list[Tensor] = field(default_factory=list)
    steps_alike: ClassVar[bool] = False

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns the mixed scores, cut by the clean logits."""
        other = others[0]
        if not self.agreed:
            logs = clean.log_softmax(dim=-1), others[:1].log_softmax(dim=-1)
            self.agreed.append(distances(*logs, swapped=False)[0] < self.agreement)
        added = scores + self.complement * other
        subtracted = scores + self.contrast * (clean - other)
        return cut(clean, torch.where(self.agreed[0][:, None], added, subtracted), self.plausibility)

    def begun(self) -> Mixture:
        """Returns the rule before the first step."""
        return replace(self, agreed=[])

    def keep(self, rows: Tensor) -> Mixture:
        """Returns the rule for some of the rows, with their modes."""
        return replace(self, rows=self.rows[rows], agreed=[agreed[rows] for agreed in self.agreed])
