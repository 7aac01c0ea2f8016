"""INTER: adds the part of the logits that needs both picture and question, at the steps where it matters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.noise import row_noise
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoding.branches import Branch, Contrast, with_pixels, without_question
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

CUT = {"variance": math.inf}
"""Where the cut acts alone."""


@dataclass(frozen=True, kw_only=True)
class INTER(Decoder):
    """Interaction Guidance Sampling: strengthens the part of the logits that needs both picture and question.

    The model is asked four times with the same text generated so far: both (f_vp), question only (f_p), picture only
    (f_v), neither (f_0). The interaction ``I = f_vp - f_p - f_v + f_0`` is the two-player Harsanyi dividend. Where
    its variance over the vocabulary is at least ``variance``, ``scores = f_vp + I``; elsewhere ``scores = f_vp``. At
    every step tokens below ``plausibility`` times the best clean probability are cut.

    Args:
        variance: k >= 0, the locator's threshold; logit scales differ between models, so sweep it. ``inf`` switches
            the modifier off and leaves the cut.
        plausibility: beta in [0, 1]; 0 cuts nothing.
        var_topk: Variance over the k most probable clean tokens only; None takes the whole vocabulary.
        mask_image: Pixels that stand for no picture: ``uniform`` noise in [0, 1), ``zeros``, ``mean`` (the picture's
            own mean per row) or ``gaussian`` noise, all in normalised pixels.
        mask_text: Text that stands for no question: ``empty`` text, or ``drop_turn``, a user turn of pictures alone.
        noise_seed: Seed of the noise, together with the picture's pixels.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: "INTER: Mitigating Hallucination in Large Vision-Language Models by Interaction Guidance Sampling",
    ICCV 2025, arXiv 2507.05056; code xxxxx313/INTER at 586f565.

    *Differs*: the released code serves InstructBLIP and sampling only, calls the model four times, and turns the
    locator on for NaN variances; here the branches are rows of one pass, entries that are -inf in any branch count as
    no interaction and are left out of the variance, and everything is float32. For other models the placeholder
    tokens and the picture's grid are kept and the user's text is deleted, which the paper does not specify.

    *Cost*: four rows per sample in one pass per token; two pictures through the vision tower, the real one shared.
    Beams and compiled decoding work. A row without a picture is left as it is.

    Example:
        >>> INTER(variance=2.0).variance
        2.0
    """

    name: ClassVar[str] = "inter"
    source: ClassVar[Source] = Source(
        title="Interaction Guidance Sampling",
        year=2025,
        arxiv="2507.05056",
        code="https://github.com/xxxxx313/INTER",
    )
    acts_on: ClassVar[str] = "logits of 4 branches"
    passes: ClassVar[int] = 4

    variance: float = parameter(
        1.0, float, low=0, high=math.inf, search=(0.1, 5.0), log=True, help="k, variance from which the modifier acts"
    )
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )
    var_topk: int | None = parameter(
        None,
        int,
        low=2,
        high=10**6,
        optional=True,
        idle=(CUT,),
        help="variance over the best k tokens; none: whole vocabulary",
    )
    mask_image: str = parameter(
        "uniform",
        str,
        choices=("uniform", "zeros", "mean", "gaussian"),
        search=("uniform", "zeros", "mean", "gaussian"),
        idle=(CUT,),
        help="what stands for no picture",
    )
    mask_text: str = parameter(
        "empty",
        str,
        choices=("empty", "drop_turn"),
        search=("empty", "drop_turn"),
        idle=(CUT,),
        help="what stands for no question",
    )
    noise_seed: int = parameter(
        0,
        int,
        low=0,
        high=2**31 - 1,
        idle=({"mask_image": "zeros"}, {"mask_image": "mean"}, CUT),
        help="seed of the noise",
    )
    when: str = steps()
    margin: float = lead()

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans three branches: question only, picture only, neither."""
        if "pixel_values" not in batch:
            return DecodingPlan()

        def masked(pixels: Tensor, owners: Tensor) -> Tensor:
            return self._no_picture(pixels, owners)

        picture = without_question(vlm, batch, prompt="" if self.mask_text == "empty" else None)
        question = with_pixels(vlm, batch, masked)
        neither = Branch(picture.batch.with_inputs(pixel_values=question.batch["pixel_values"]))
        rule = Interaction(
            branches=(question, picture, neither),
            rows=layout.tokens.any(dim=1),
            variance=self.variance,
            plausibility=self.plausibility,
            var_topk=self.var_topk,
            margin=margin_of(self.when, self.margin),
        )
        return DecodingPlan(contrasts=(rule,))

    def _no_picture(self, pixels: Tensor, owners: Tensor) -> Tensor:
        if self.mask_image == "zeros":
            return torch.zeros_like(pixels)
        if self.mask_image == "mean":
            index = owners.to(pixels.device)
            sums = torch.zeros(int(owners.max()) + 1, device=pixels.device)
            sums = sums.index_add(0, index, pixels.float().flatten(1).mean(dim=1))
            means = sums / index.bincount().clamp(min=1)
            return means[index].view(-1, *[1] * (pixels.dim() - 1)).expand_as(pixels).to(pixels.dtype)
        noise = row_noise(pixels, owners, self.noise_seed, uniform=self.mask_image == "uniform")
        return noise.to(pixels.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Interaction(Contrast):
    """Adds the interaction of picture and question where its variance is large."""

    variance: float
    plausibility: float
    var_topk: int | None = None

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + I`` where the locator is on, cut by the clean logits at every step."""
        question, picture, neither = others
        interaction, spread = self.interaction(clean, question, picture, neither)
        on = spread >= self.variance  # (B,)
        return cut(clean, torch.where(on[:, None], scores + interaction, scores), self.plausibility)

    def interaction(self, clean: Tensor, question: Tensor, picture: Tensor, neither: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the interaction (Harsanyi dividend) and its unbiased variance.

        Args:
            clean: (B, V) logits with picture and question.
            question: (B, V) logits with the question only.
            picture: (B, V) logits with the picture only.
            neither: (B, V) logits with neither.

        Returns:
            (B, V) interaction, zero where a branch is -inf, and (B,) variance over the tokens that count.
        """
        real = torch.stack([clean, question, picture, neither]).isfinite().all(dim=0)  # (B, V)
        difference = clean - question - picture + neither
        interaction = torch.where(real, difference, 0.0)
        counted = real
        if self.var_topk is not None and self.var_topk < clean.shape[-1]:
            best = clean.topk(self.var_topk, dim=-1).indices
            counted = real & torch.zeros_like(real).scatter(-1, best, True)
        count = counted.sum(dim=-1, keepdim=True)
        mean = (interaction * counted).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        squares = torch.where(counted, (interaction - mean).square(), 0.0).sum(dim=-1)
        # The unbiased variance of a single token is undefined; it carries no information, so it counts as zero.
        return interaction, squares / (count.squeeze(-1) - 1).clamp(min=1)
