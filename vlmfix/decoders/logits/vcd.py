"""VCD: contrasts the logits with those of the same question about a noised picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.mixture import Mixture
from vlmfix.decoders.logits.noise import row_noise
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoding.branches import Contrast, with_pixels
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

STEPS = 1000
"""Number of steps of the diffusion schedule."""


def kept_signal(step: int) -> float:
    """Computes the schedule's cumulative product at a step, in (0, 1): the kept share of the picture's variance."""
    ramp = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.005 - 1e-5) + 1e-5
    return float((1 - ramp[: step + 1]).prod())


def noised(pixels: Tensor, owners: Tensor, step: int, seed: int) -> Tensor:
    """Adds the noise of one diffusion step to normalised pixels.

    Args:
        pixels: (n, ...) normalised pixel values.
        owners: (n,) int64, row that each entry belongs to; each row gets a draw of its own.
        step: Diffusion step.
        seed: Seed of the noise, together with the row's pixels.

    Returns:
        Noised pixels, same shape and dtype.
    """
    keep = kept_signal(step)
    noise = row_noise(pixels, owners, seed, uniform=False)
    return (math.sqrt(keep) * pixels.float() + math.sqrt(1 - keep) * noise).to(pixels.dtype)


@dataclass(frozen=True, kw_only=True)
class VCD(Decoder):
    """Visual Contrastive Decoding: subtracts the logits of a noised picture, which hold the language prior.

    ``scores = (1 + contrast) * clean - contrast * noised``, then tokens whose clean probability is below
    ``plausibility`` times the largest are cut. The noised picture is one step of forward diffusion on the normalised
    pixels, ``sqrt(a) * pixels + sqrt(1 - a) * noise`` with ``a`` from a sigmoid schedule at ``noise_step``.

    Args:
        preset: ``paper`` (contrast 1, plausibility 0.1, step 500) or ``official-code`` (the released POPE script:
            plausibility 0.2).
        contrast: alpha >= 0, weight of the contrast.
        plausibility: beta in [0, 1]; 0 cuts nothing.
        noise_step: Diffusion step in [0, 999]; more is noisier.
        noise_seed: Seed of the noise. The noise of a picture depends on this and on its pixels alone, so an answer
            does not depend on the order of the data or on the batch.
        agreement: Divergence in nats; 0 contrasts every row. Rows whose first distribution differs from the noised
            picture's by less (Jensen-Shannon) add the second row's logits for their whole answer, as ``mod`` does.
        complement: Weight of the second row's logits in these rows.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual
    Contrastive Decoding", CVPR 2024, arXiv 2311.16922; code DAMO-NLP-SG/VCD.

    *Differs*: the released sampler seeds nothing and runs the branch as a second pass; here it is a row of the same
    pass. The sampler's own fall-back (contrast 0.5) is reachable by ``contrast=0.5``. The cut also applies to greedy
    search, where it matters only if the contrast's first choice is implausible.

    *Cost*: two rows per sample, one pass per token; the vision tower sees each picture twice, once in prefill.
    Beams and compiled decoding work. A row without a picture is left as it is.

    Example:
        >>> VCD(contrast=0.5).spec()
        'vcd:preset=paper,contrast=0.5,plausibility=0.1,noise_step=500,noise_seed=0'
    """

    name: ClassVar[str] = "vcd"
    source: ClassVar[Source] = Source(
        title="Visual Contrastive Decoding",
        year=2024,
        arxiv="2311.16922",
        code="https://github.com/DAMO-NLP-SG/VCD",
    )
    acts_on: ClassVar[str] = "logits of 2 branches"
    passes: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"contrast": 1.0, "plausibility": 0.1, "noise_step": 500},
        "official-code": {"contrast": 1.0, "plausibility": 0.2, "noise_step": 500},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="named set of parameters")
    contrast: float = parameter(
        None, float, low=0, high=10, search=(0.05, 2.0), log=True, help="alpha, weight of the contrast"
    )
    plausibility: float = parameter(
        None, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )
    noise_step: int = parameter(
        None, int, low=0, high=STEPS - 1, search=(200, 999), help="diffusion step of the noised picture"
    )
    noise_seed: int = parameter(0, int, low=0, high=2**31 - 1, help="seed of the noise")
    agreement: float = parameter(
        0.0, float, low=0, high=1, later=True, help="divergence below which a row adds the noised logits; 0: none does"
    )
    complement: float = parameter(
        4.0, float, low=0, high=20, later=True, idle=({"agreement": 0.0},), help="weight of the noised logits there"
    )
    when: str = steps()
    margin: float = lead()

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one branch with noised pixels."""
        if "pixel_values" not in batch:
            return DecodingPlan()
        pictured = layout.tokens.any(dim=1)
        branch = with_pixels(
            vlm, batch, lambda pixels, owners: noised(pixels, owners, self.noise_step, self.noise_seed)
        )
        shared: dict[str, Any] = {
            "branches": (branch,),
            "rows": pictured,
            "contrast": self.contrast,
            "plausibility": self.plausibility,
            "margin": margin_of(self.when, self.margin),
        }
        if self.agreement == 0:
            return DecodingPlan(contrasts=(ImageContrast(**shared),))
        mixed = Mixture(**shared, agreement=self.agreement, complement=self.complement)
        return DecodingPlan(contrasts=(mixed,))


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageContrast(Contrast):
    """Pushes the scores away from one branch, then cuts implausible tokens."""

    contrast: float
    plausibility: float

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + contrast * (clean - branch)``, cut by the clean logits."""
        return cut(clean, scores + self.contrast * (clean - others[0]), self.plausibility)
