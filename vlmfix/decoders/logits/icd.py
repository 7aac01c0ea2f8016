"""ICD: contrasts the logits with those under an instruction that disturbs the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoders.logits.vcd import ImageContrast
from vlmfix.decoding.branches import with_instruction, with_question
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

SYSTEM = "You are a confused objects detector to provide a fuzzy overview or impression of the image."
"""The authors' instruction."""
BEFORE_QUESTION = "You are a confused object detector."
"""The instruction of SID's port to LLaVA."""


@dataclass(frozen=True, kw_only=True)
class ICD(Decoder):
    """Instruction Contrastive Decoding: subtracts the logits of the same question under a disturbing instruction.

    ``scores = (1 + contrast) * clean - contrast * disturbed``, then tokens whose clean probability is below
    ``plausibility`` times the largest are cut. The instruction, that the model be a confused detector of objects, makes
    it name what usually goes together.

    Args:
        preset: ``official-code`` (the instruction in place of the system message, as the released LLaVA script has it)
            or ``sid-port`` (a shorter one between picture and question, and contrast 0.5, as in SID's comparison).
        contrast: alpha >= 0, weight of the contrast.
        plausibility: beta in [0, 1]; 0 cuts nothing.
        place: Where the instruction stands: ``system`` or ``question``.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: Wang et al., "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive
    Decoding", Findings of ACL 2024, arXiv 2403.18715; code p1k0pan/ICD.

    *Differs*: the paper's model is InstructBLIP, whose Q-Former reads the instruction; models of this package have
    none. The released scripts draw tokens; here the cut applies to greedy search as well.

    *Cost*: two rows per sample, one pass per token. With ``place=system`` the instruction stands before the picture, so
    nothing of the prompt is shared but the picture's features; with ``question`` everything up to it is.

    Example:
        >>> ICD(place="question").spec()
        'icd:preset=official-code,contrast=1,plausibility=0.1,place=question'
    """

    name: ClassVar[str] = "icd"
    source: ClassVar[Source] = Source(
        title="Instruction Contrastive Decoding", year=2024, arxiv="2403.18715", code="https://github.com/p1k0pan/ICD"
    )
    acts_on: ClassVar[str] = "logits of 2 branches"
    passes: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "official-code": {"contrast": 1.0, "place": "system"},
        "sid-port": {"contrast": 0.5, "place": "question"},
    }

    preset: str = parameter("official-code", str, choices=("official-code", "sid-port"), help="named set of parameters")
    contrast: float = parameter(
        None, float, low=0, high=10, search=(0.05, 2.0), log=True, help="alpha, weight of the contrast"
    )
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )
    place: str = parameter(
        None, str, choices=("system", "question"), search=("system", "question"), help="where the instruction stands"
    )
    when: str = steps()
    margin: float = lead()

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one branch with the instruction, for rows that have a picture."""
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        if self.place == "system":
            branch = with_instruction(vlm, batch, SYSTEM)
        else:
            branch = with_question(vlm, batch, lambda question: f"{BEFORE_QUESTION} {question}")
        rule = ImageContrast(
            branches=(branch,),
            rows=pictured,
            contrast=self.contrast,
            plausibility=self.plausibility,
            margin=margin_of(self.when, self.margin),
        )
        return DecodingPlan(contrasts=(rule,))
