"""APC: the plausibility cut alone, which every contrast has beside its own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, kw_only=True)
class APC(Decoder):
    """Adaptive plausibility constraint: forbids tokens that the model itself finds far less probable than its best one.

    Contrastive methods cut their scores in this way, and what the cut gives is easily taken for what the contrast
    gives. This is the arm to hold them against. It matters where tokens are drawn; greedy search takes the best token,
    which is never cut.

    Args:
        plausibility: beta in [0, 1]; tokens below this share of the largest probability are cut, 0 cuts nothing.

    *Source*: Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization", ACL 2023, arXiv 2210.15097,
    equation 3; the share is the one that methods for pictures use.

    *Differs*: nothing is contrasted.

    *Cost*: none.

    Example:
        >>> APC(plausibility=0.2).spec()
        'apc:plausibility=0.2'
    """

    name: ClassVar[str] = "apc"
    source: ClassVar[Source] = Source(title="Adaptive plausibility constraint", year=2023, arxiv="2210.15097")
    acts_on: ClassVar[str] = "logits"

    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the cut, for every row."""
        every = layout.tokens.new_ones(batch.rows)
        return DecodingPlan(contrasts=(Cut(branches=(), rows=every, plausibility=self.plausibility),))


@dataclass(frozen=True, eq=False, kw_only=True)
class Cut(Contrast):
    """Cuts implausible tokens."""

    plausibility: float

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores, cut by the clean logits."""
        return cut(clean, scores, self.plausibility)
