"""ONLY: asks a second stream that one layer makes, of heads that read text, and adds its logits or subtracts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, Site, SplitEdit
from vlmfix.attention.session import noted
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.exits import Exit
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream.attention import output_projection
from vlmfix.upstream.readout import blended, first_norm, read_out, with_attention, with_mlp

HEARD = "heard"
"""Name under which the outputs of the heads that stay are kept from step to step."""
STREAM, CLEAN = 0.2, 0.5
"""Shares, in the released code, of the stream that enters the last layer, and of the clean last state."""
LEAST = 1e-6
"""What is added to a share before its logarithm, and the least entropy of the picture's, as in the released code."""


@dataclass(frozen=True, kw_only=True)
class ONLY(Decoder):
    """One-Layer Intervention: hears, beside the model, what one layer makes of the heads that read text widely.

    In ``layer`` the newest row's attention of each head is split into that to the picture and that to the text; of each
    part the weights above its mean and standard deviation are left out, and the entropy of the rest is taken. Heads
    whose ratio of text entropy to picture entropy is below the mean of all heads are switched off. What the others say
    becomes a second distribution. Where its total variation distance from the clean one is below ``agreement``, its
    logits are added: ``clean + complement * second``; elsewhere they are subtracted:
    ``(1 + contrast) * clean - contrast * second``. Then tokens whose clean probability is below ``plausibility`` times
    the largest are cut.

    Args:
        preset: ``official-code``, the default, whose way is known for sure, or ``paper``; they set ``path`` and
            ``agreement``.
        path: How the heads become logits. ``layer``: the rest of the same layer, the last norm and the output head.
            ``released``: without the weights that were left out, past all layers to the last, where the layer's first
            norm is applied and 0.2 of the stream that enters it is added; its MLP, the last norm, 0.5 of the clean last
            state, the output head.
        layer: Number of the layer, from 0.
        agreement: gamma in [0, 1]. The paper has 0.2 for questions; the released code sums absolute differences without
            a half, so that its 0.2 is 0.1 here, and the 0.25 of its captions 0.125.
        complement: Weight of the second logits where both agree.
        contrast: Weight of the contrast elsewhere.
        plausibility: beta in [0, 1]; 0 cuts nothing.

    *Source*: Wan et al., "ONLY: One-Layer Intervention Sufficiently Mitigates Hallucinations in Large Vision-Language
    Models", ICCV 2025, arXiv 2507.00898; code zifuwan/ONLY.

    *Differs*: the released code draws tokens, knows LLaVA's places of the picture alone, and sums distance over the
    batch; here each row has its heads and its mode, and greedy search and beams work. ``path=layer`` is read from
    descriptions of the paper, not from its text. The first token of a prompt, an attention sink, counts as no text.

    *Cost*: one pass per token; a row of attention in one layer, one MLP and the output head once more.

    Example:
        >>> ONLY(preset="paper").spec()
        'only:preset=paper,path=layer,layer=0,agreement=0.2,complement=3,contrast=1,plausibility=0.1'
    """

    name: ClassVar[str] = "only"
    source: ClassVar[Source] = Source(
        title="One-Layer Intervention", year=2025, arxiv="2507.00898", code="https://github.com/zifuwan/ONLY"
    )
    acts_on: ClassVar[str] = "logits of one layer"
    compiles: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"path": "layer", "agreement": 0.2},
        "official-code": {"path": "released", "agreement": 0.1},
    }

    preset: str = parameter("official-code", str, choices=("paper", "official-code"), help="named set of parameters")
    path: str = parameter(None, str, choices=("layer", "released"), help="how the heads become logits")
    layer: int = parameter(0, int, low=0, high=1000, help="layer whose heads are heard")
    agreement: float = parameter(
        None, float, low=0, high=1, search=(0.02, 0.6), log=True, help="gamma, distance below which both agree"
    )
    complement: float = parameter(3.0, float, low=0, high=20, search=(0.5, 6.0), help="weight where they agree")
    contrast: float = parameter(1.0, float, low=0, high=10, search=(0.05, 2.0), log=True, help="weight elsewhere")
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the reading of the heads and the rule, for rows that have a picture."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"only cannot act: {reason}", "give a smaller layer")
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        released = self.path == "released"
        rule = Adaptive(
            branches=(),
            rows=pictured,
            exits=(Heads(after=self.layer, normed=True, last=vlm.layers - 1 if released else None),),
            agreement=self.agreement,
            complement=self.complement,
            contrast=self.contrast,
            plausibility=self.plausibility,
        )
        heads = TextHeads(layers=LayerSet(str(self.layer)), trimmed=released)
        return DecodingPlan(edits=(heads,), contrasts=(rule,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the model has the layer."""
        return None if self.layer < vlm.layers else f"layer {self.layer} is beyond the model's {vlm.layers} layers"


@dataclass(frozen=True, eq=False, kw_only=True)
class TextHeads(SplitEdit):
    """Keeps what the heads say that read text widely; it changes nothing.

    Attributes:
        trimmed: Whether weights that the entropies leave out are left out of what the heads say, too.
    """

    trimmed: bool
    rows: ClassVar[Rows] = "last"

    def keys(self, site: Site) -> Tensor:
        """Returns the keys that the newest row sees, (B, K)."""
        return site.allowed[:, 0, -1]

    def share(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights of the heads that stay, (B, H, R, K)."""
        allowed = site.allowed[:, :1]  # (1 or B, 1, R, K)
        text = (site.text_keys | site.answer_keys)[:, None, None] & allowed
        text = text & (text.cumsum(dim=-1) > 1)  # without a prompt's first token
        image = site.image_keys[:, None, None] & allowed
        usual = [part & ~outlying(weights, part) for part in (text, image)]
        widely = entropy(weights, usual[1]).clamp(min=LEAST)
        looks = weights.where(image, 0.0).sum(dim=-1, keepdim=True) > 0
        ratio = entropy(weights, usual[0]) / widely.where(looks, torch.inf)  # (B, H, R, 1), 0 as in the released code
        stays = ratio >= ratio.mean(dim=1, keepdim=True)
        said = weights
        if self.trimmed:
            said = weights.masked_fill((text & ~usual[0]) | (image & ~usual[1]), 0.0)
        return torch.where(stays, said, 0.0)

    def output(self, site: Site, whole: Tensor, part: Tensor, mass: Tensor) -> Tensor:
        """Keeps the newest row's part, (B, H, D); returns the outputs as they were."""
        if site.prefill:
            site.learn_of_steps(HEARD, part[:, :, -1])
        else:
            site.relearn(HEARD, part[:, :, -1])
        return whole


def outlying(weights: Tensor, part: Tensor) -> Tensor:
    """Marks weights above mean and standard deviation of some keys', (..., K) bool.

    Args:
        weights: (..., K).
        part: (..., K) bool, these keys; broadcastable.
    """
    count = part.sum(dim=-1, keepdim=True)
    mean = weights.where(part, 0.0).sum(dim=-1, keepdim=True) / count
    spread = (weights - mean).square().where(part, 0.0).sum(dim=-1, keepdim=True) / (count - 1)
    return weights > mean + spread.sqrt()


def entropy(weights: Tensor, part: Tensor) -> Tensor:
    """Computes the entropy of the shares that some keys have in their sum, (..., 1); 0 where that is 0.

    Args:
        weights: (..., K).
        part: (..., K) bool, these keys.
    """
    own = weights.where(part, 0.0)
    total = own.sum(dim=-1, keepdim=True)
    share = own / total.where(total > 0, 1.0)
    return -(share * (share + LEAST).log()).sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Heads(Exit):
    """Names the way from the heads that ``TextHeads`` heard to logits.

    Attributes:
        last: Number of the last layer, for the released way; None for the paper's.
    """

    last: int | None = None

    @property
    def reads(self) -> frozenset[int]:
        """Returns what enters the layer, or the last one, and what leaves that."""
        return frozenset({self.after} if self.last is None else {self.last, self.last + 1})

    def logits(self, vlm: Checkpoint, streams: Mapping[int, Tensor]) -> Tensor:
        """Computes the second logits, (R, V) float32."""
        layers, decoder = vlm.family.layers(vlm.model), vlm.family.decoder(vlm.model)
        project = output_projection(vlm.family.attention_modules(vlm.model)[self.after])
        output = project(noted(vlm, self.after, HEARD).flatten(1).to(project.weight.dtype))  # (R, D)
        if self.last is None:
            layer = layers[self.after]
            heard = with_mlp(layer, with_attention(layer, streams[self.after], output))
            return read_out(vlm.model, decoder, heard, normed=True)
        last = layers[self.last]
        heard = with_mlp(last, first_norm(last)(output) + STREAM * streams[self.last])
        return blended(vlm.model, decoder, heard, behind=streams[self.last + 1], share=CLEAN)


@dataclass(frozen=True, eq=False, kw_only=True)
class Adaptive(Contrast):
    """Adds the second logits to the scores where both distributions agree, and pushes the scores away elsewhere.

    Attributes:
        agreement: gamma.
        complement: Weight where they agree.
        contrast: Weight elsewhere.
        plausibility: beta.
    """

    agreement: float
    complement: float
    contrast: float
    plausibility: float
    steps_alike: ClassVar[bool] = False

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns the new scores, cut by the clean logits."""
        second = others[0]
        distance = (clean.softmax(dim=-1) - second.softmax(dim=-1)).abs().sum(dim=-1, keepdim=True) / 2
        added = scores + self.complement * second
        away = scores + self.contrast * (clean - second)
        return cut(clean, torch.where(distance < self.agreement, added, away), self.plausibility)
