"""VAF: raises the attention scores of the picture in middle layers, and lowers those of what stands before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, ScoreEdit, Site
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


def middle(count: int) -> LayerSet:
    """Returns, of a model with ``count`` layers, those that 9 to 14 are of 32."""
    return LayerSet(f"{round(9 / 32 * count)}:{max(round(15 / 32 * count), round(9 / 32 * count) + 1)}")


@dataclass(frozen=True, kw_only=True)
class VAF(Decoder):
    """Visual Amplification Fusion: scales scores of the picture up and those of the system prompt down.

    In rows of text behind the picture and of generated tokens, in the layers where a model fuses the two. Scores may be
    negative, and a factor above 1 then lowers them: ``signs=safe`` adds ``(factor - 1) * |score|`` in place of
    multiplying, ``signs=product`` multiplies as the released code does.

    Args:
        preset: ``safe`` or ``official-code`` (products).
        image: Factor on scores of the picture, at least 0; above 1 raises them.
        system: Factor on scores of what stands before the picture, at least 0; below 1 lowers them.
        signs: ``safe`` or ``product``.
        layers: Layers to act in. None takes the authors' 9 to 14 of 32, as shares of the model's depth.

    *Source*: Yin et al., "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large
    Language Models", CVPR 2025, arXiv 2503.13107; the released code's adapter. The paper itself was not at hand:
    factors and layers are those of the code.

    *Differs*: the default repairs the sign. What stands before the picture is found in the prompt, not by fixed places,
    and padding is no part of it.

    *Cost*: the rows of the prompt behind the picture, and one row a token, are computed from their scores in the layers
    that it acts in.

    Example:
        >>> VAF(image=1.2).spec()
        'vaf:preset=safe,image=1.2,system=0.95,signs=safe,layers=none'
    """

    name: ClassVar[str] = "vaf"
    source: ClassVar[Source] = Source(title="ClearSight, visual amplification fusion", year=2025, arxiv="2503.13107")
    acts_on: ClassVar[str] = "attention scores"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "safe": {"signs": "safe"},
        "official-code": {"signs": "product"},
    }

    preset: str = parameter("safe", str, choices=("safe", "official-code"), help="named set of parameters")
    image: float = parameter(1.15, float, low=0, high=10, search=(1.0, 2.0), help="factor on scores of the picture")
    system: float = parameter(
        0.95, float, low=0, high=10, search=(0.5, 1.0), help="factor on scores of what stands before it"
    )
    signs: str = parameter(None, str, choices=("safe", "product"), help="how negative scores are treated")
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="layers to act in; none: 9 to 14 of 32, by depth"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the text's rows."""
        if not bool(layout.tokens.any()):
            return DecodingPlan()
        edit = Amplified(
            layers=self.layers or middle(vlm.layers), image=self.image, system=self.system, safe=self.signs == "safe"
        )
        return DecodingPlan(edits=(edit,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Amplified(ScoreEdit):
    """Scales the scores of image tokens and of the text before them.

    Attributes:
        image: Factor on the former.
        system: Factor on the latter.
        safe: Whether a factor acts on a score's size, so that one above 1 always raises.
    """

    image: float
    system: float
    safe: bool
    rows: ClassVar[Rows] = "text"
    blockwise: ClassVar[bool] = True

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Returns the scaled scores, (B, H, R, K)."""
        if site.prefill:
            site.learn_of_keys("system", self._before(site))
        image, system = site.image_keys[:, None, None], site.learned("system")[:, None, None, : scores.shape[-1]]
        for keys, factor in ((image, self.image), (system, self.system)):
            new = scores + (factor - 1) * scores.abs() if self.safe else factor * scores
            scores = torch.where(keys, new, scores)
        return scores

    def _before(self, site: Site) -> Tensor:
        """Marks the text before each row's first image token, (B, T); none where a row has no picture."""
        image, text = (keys[:, : site.prompt] for keys in (site.image_keys, site.text_keys))
        begun = image.cumsum(dim=1) > 0
        return text & ~begun & image.any(dim=1, keepdim=True)
