"""FLB: adds the logits of the first token to those of every later one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
class FLB(Decoder):
    """First Logit Boosting: keeps what the picture said of the first token, and adds it as the answer grows.

    The first token is chosen right behind the picture, when attention to it is strongest. With ``l_0`` its logits, the
    token at step t = 0, 1, ... gets ``l_t + strength * (1 - exp(-decay * t)) * l_0``; then tokens are cut whose
    probability under ``l_t`` is below ``plausibility`` times the largest. Half of the effect, the authors find, is that
    ``l_0`` favours words that begin a sentence, such as "The".

    Args:
        strength: gamma in [0, 10], weight of the first logits in the end.
        decay: lambda in [0, 10], how fast it gets there.
        plausibility: beta in [0, 1]; 0 cuts nothing.

    *Source*: Ha et al., "First Logit Boosting", CVPR 2026, arXiv 2604.00455; code jiwooha20/FLB.

    *Differs*: the released code only draws tokens; here greedy search and beams work as well. An answer of one token is
    that of the cut alone. In a chain the cut is taken from what methods before it have made of the logits, and ``l_0``
    is the model's own, as released. Rows without a picture are left alone.

    *Cost*: none but a row of logits for each sample.

    Example:
        >>> FLB(strength=0.5).spec()
        'flb:strength=0.5,decay=0.05,plausibility=0.1'
    """

    name: ClassVar[str] = "flb"
    source: ClassVar[Source] = Source(
        title="First Logit Boosting", year=2026, arxiv="2604.00455", code="https://github.com/jiwooha20/FLB"
    )
    acts_on: ClassVar[str] = "logits"
    compiles: ClassVar[bool] = False

    strength: float = parameter(
        0.3, float, low=0, high=10, search=(0.05, 1.0), log=True, help="gamma, weight of the first logits in the end"
    )
    decay: float = parameter(
        0.05, float, low=0, high=10, search=(0.005, 0.2), log=True, help="lambda, how fast the weight grows"
    )
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the boost, for rows that have a picture."""
        pictured = layout.tokens.any(dim=1)
        rule = Boost(
            branches=(), rows=pictured, strength=self.strength, decay=self.decay, plausibility=self.plausibility
        )
        return DecodingPlan(contrasts=(rule,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Boost(Contrast):
    """Adds the first logits to the scores.

    Attributes:
        strength: gamma.
        decay: lambda.
        plausibility: beta.
        past: The logits of each step's rows that count: ``l_0`` of the present rows, once the first token has passed.
        step: One number, that of the step to come.
    """

    strength: float
    decay: float
    plausibility: float
    past: list[Tensor] = field(default_factory=list)
    step: list[int] = field(default_factory=lambda: [0])
    steps_alike: ClassVar[bool] = False
    counts: ClassVar[bool] = True

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + weight * first``, cut by ``scores``."""
        if not self.past:
            self.past.append(clean.clone())
        weight = self.strength * -math.expm1(-self.decay * self.step[0])
        self.step[0] += 1
        return cut(scores, scores + weight * self.past[0], self.plausibility)

    def begun(self) -> Boost:
        """Returns the rule before the first step."""
        return replace(self, past=[], step=[0])

    def keep(self, rows: Tensor) -> Boost:
        """Returns the rule for some of the rows, with their first logits."""
        return replace(self, rows=self.rows[rows], past=[first[rows] for first in self.past])
