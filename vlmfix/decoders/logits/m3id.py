"""M3ID: contrasts the logits with those without the picture, the more the longer the answer gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoding.branches import Contrast, without_picture
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


def weight_at(step: int, decay: float, most: float) -> float:
    """Computes the weight of a step, ``(1 - gamma) / gamma`` with ``gamma = exp(-decay * step)``, at most ``most``."""
    return min(math.expm1(decay * step) if decay * step < 700 else math.inf, most)


@dataclass(frozen=True, kw_only=True)
class M3ID(Decoder):
    """Multi-Modal Mutual-Information Decoding: favours tokens that the picture makes more probable than the text alone.

    With ``c`` and ``u`` the logits with and without the picture, the token at step t gets
    ``c + (exp(decay * t) - 1) * (c - u)``: a model looks at the picture less and less as its answer grows, and the
    weight grows against it. Then tokens whose clean probability is below ``plausibility`` times the largest are cut.

    Args:
        preset: ``avisc`` (steps count from 1) or ``only`` (from 0, so that the first token has no weight), after the
            two released re-implementations; the authors have released none.
        decay: lambda >= 0, how fast the weight grows; 0.02 gives 0.02 at the first token, 1.7 at the fiftieth.
        plausibility: beta in [0, 1]; 0 cuts nothing.
        confidence: Rows whose best token has at least this clean probability are left alone, in [0, 1]; 1 contrasts
            always, as both re-implementations do.
        max_weight: The weight grows no further; it would reach 20,000 at 500 tokens. None has no limit.
        first_step: Number of the first token's step, 0 or 1.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: Favero et al., "Multi-Modal Hallucination Control by Visual Information Grounding", CVPR 2024, arXiv
    2403.14003, section 4; re-implementations in sangminwoo/AvisC and zifuwan/ONLY.

    *Differs*: the paper contrasts only where the model is unsure, in place of a cut; its threshold could not be
    checked, so ``confidence`` is open and the cut of the re-implementations is the default.

    *Cost*: two rows per sample, one pass per token. The second row has no picture, so that its prompt is short and
    little of it passes; in the cache it is as wide as the first.

    Example:
        >>> M3ID(decay=0.01).spec()
        'm3id:preset=avisc,decay=0.01,plausibility=0.1,confidence=1,max_weight=none,first_step=1'
    """

    name: ClassVar[str] = "m3id"
    source: ClassVar[Source] = Source(title="Multi-Modal Mutual-Information Decoding", year=2024, arxiv="2403.14003")
    acts_on: ClassVar[str] = "logits of 2 branches"
    passes: ClassVar[int] = 2
    compiles: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {"avisc": {"first_step": 1}, "only": {"first_step": 0}}

    preset: str = parameter("avisc", str, choices=("avisc", "only"), help="whose count of steps")
    decay: float = parameter(
        0.02, float, low=0, high=1, search=(0.002, 0.1), log=True, help="lambda, how fast the weight grows"
    )
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )
    confidence: float = parameter(
        1.0, float, low=0, high=1, search=(0.5, 1.0), help="rows at least as sure are left alone; 1: none"
    )
    max_weight: float | None = parameter(
        None, float, low=0, high=1e6, optional=True, help="limit of the weight; none: it grows on"
    )
    first_step: int = parameter(None, int, low=0, high=1, help="number of the first token's step")
    when: str = steps()
    margin: float = lead()

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one branch without the picture, for rows that have one."""
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        rule = GrowingContrast(
            branches=(without_picture(vlm, batch),),
            rows=pictured,
            decay=self.decay,
            plausibility=self.plausibility,
            confidence=self.confidence,
            max_weight=math.inf if self.max_weight is None else self.max_weight,
            first_step=self.first_step,
            margin=margin_of(self.when, self.margin),
        )
        return DecodingPlan(contrasts=(rule,))


@dataclass(frozen=True, eq=False, kw_only=True)
class GrowingContrast(Contrast):
    """Pushes the scores away from one branch with a weight that grows from step to step.

    Attributes:
        decay: lambda.
        plausibility: beta.
        confidence: Clean probability of the best token from which on a row is left alone.
        max_weight: Limit of the weight, or infinity.
        first_step: Number of the first token's step.
        passed: One number, how many steps have passed.
    """

    decay: float
    plausibility: float
    confidence: float
    max_weight: float
    first_step: int = 1
    passed: list[int] = field(default_factory=lambda: [0])
    steps_alike: ClassVar[bool] = False
    counts: ClassVar[bool] = True

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + weight * (clean - branch)``, cut by the clean logits."""
        weight = weight_at(self.first_step + self.passed[0], self.decay, self.max_weight)
        self.passed[0] += 1
        new = cut(clean, scores + weight * (clean - others[0]), self.plausibility)
        if self.confidence == 1:
            return new
        unsure = clean.softmax(dim=-1).max(dim=-1, keepdim=True).values < self.confidence
        return torch.where(unsure, new, scores)

    def begun(self) -> GrowingContrast:
        """Returns the rule before the first step."""
        return replace(self, passed=[0])
