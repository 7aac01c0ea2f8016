"""SPIN: silences, token by token, the heads that look at the picture least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmfix.attention.edit import AttentionEdit, LayerSet, Rows, ScoreEdit, Site, WeightEdit
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


class Settings(NamedTuple):
    """Holds the settings that the authors ran on one model."""

    kept_share: float
    suppression: float
    layers: LayerSet


ELSEWHERE = Settings(kept_share=0.95, suppression=0.0, layers=LayerSet("all"))
"""Defaults of the released program, for models that the authors did not run."""
SETTINGS: dict[tuple[str, int, int, int], Settings] = {
    ("llama", 4096, 32, 32): Settings(kept_share=0.95, suppression=0.08, layers=LayerSet("all")),
    ("llama", 5120, 40, 40): Settings(kept_share=0.9, suppression=0.0, layers=LayerSet("0:20")),
}
"""By the text model's type, hidden size, layers and key/value heads: LLaVA-1.5-7B on captions, and 13B."""


def kept_heads(share: float, heads: int) -> int:
    """Computes floor(share * heads), with 0.7 of 10 being 7 whatever the last binary digit says."""
    return math.floor(share * heads + 1e-9)


@dataclass(frozen=True, kw_only=True)
class SPIN(Decoder):
    """Image-guided head suppression: turns down heads that hardly look at the picture and speak from language.

    In every layer, at the row that predicts and at every generated token, head h gets

    - ``paper``: ``u[h] = sum over image keys of a[h]``, its attention to the picture after the softmax;
    - ``official-code``: ``u[h] = sum over image keys of z[h]``, the scaled scores before it.

    The ``floor(kept_share * H)`` heads with the largest u keep their output, the others' output, before the output
    projection, is multiplied by ``suppression``. Prompt rows before the last are never edited. Query heads are ranked
    each for itself, also where several share keys and values.

    Args:
        preset: How heads are ranked, ``paper`` or ``official-code``; the two choose different heads.
        kept_share: r in [0, 1], share of heads that keep their output; None takes the authors' value for the model
            (LLaVA-1.5-7B on captions 0.95, on POPE they give 0.8; LLaVA-1.5-13B 0.9; elsewhere 0.95).
        suppression: alpha_s in [0, 1], factor on the other heads; None takes the authors' value for the model
            (LLaVA-1.5-7B on captions 0.08, on POPE they give 0.1; elsewhere 0).
        layers: Layers to act in; None takes the authors' for the model (LLaVA-1.5-13B the first 20; elsewhere all).

    *Source*: "SPIN", EMNLP 2025, arXiv 2505.16411; code YUECHE77/SPIN.

    *Differs*: the paper ranks heads by their attention, its code by their scores: both are here, as presets. The gates
    of the code are a monotone function of u and are left out. Its switch is on whenever it is named, ``False``
    included, and it serves no grouped queries; neither is reproduced. The authors' Qwen-VL-Chat (r 0.7 in the first
    20 of 32 layers) is another model than Qwen2-VL and its successors, which therefore take the general defaults. A
    row without a picture is left as it is.

    *Cost*: one pass per token. One row of attention per head is materialised, in prefill and in decoding. Beams and
    compiled decoding work.

    Example:
        >>> SPIN(kept_share=0.8, suppression=0.1).spec()
        'spin:preset=paper,kept_share=0.8,suppression=0.1,layers=none'
    """

    name: ClassVar[str] = "spin"
    source: ClassVar[Source] = Source(
        title="Image-Guided Head Suppression",
        year=2025,
        arxiv="2505.16411",
        code="https://github.com/YUECHE77/SPIN",
    )
    acts_on: ClassVar[str] = "head outputs"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {"paper": {}, "official-code": {}}

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="how heads are ranked")
    kept_share: float | None = parameter(
        None,
        float,
        low=0,
        high=1,
        optional=True,
        search=(0.5, 0.99),
        help="r, share of heads that keep their output; none: the authors' for the model",
    )
    suppression: float | None = parameter(
        None,
        float,
        low=0,
        high=1,
        optional=True,
        search=(0.0, 0.9),
        help="alpha_s, factor on the other heads; none: the authors' for the model",
    )
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="layers to act in; none: the authors' for the model"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the rows that predict."""
        own = self.settings(vlm)
        kind = {"paper": ByAttention, "official-code": ByScores}[self.preset]
        return DecodingPlan(edits=(kind(layers=own.layers, share=own.kept_share, factor=own.suppression),))

    def folded(self, vlm: Checkpoint) -> dict[int, Tensor]:
        """Returns the factors where they are constant: no head is turned down, or all are in the last layer alone.

        In every layer but the last, the prompt's earlier rows, which are not edited, are what later rows read.
        """
        own = self.settings(vlm)
        kept, acting = kept_heads(own.kept_share, vlm.heads), sorted(own.layers.resolve(vlm.layers))
        if own.suppression == 1 or kept == vlm.heads or not acting:
            return {}
        if kept > 0:
            reason = f"it ranks {vlm.heads} heads by each row's look at the picture, and turns {vlm.heads - kept} down"
            hint = "only kept_share=0 turns down the same heads everywhere"
        elif acting != [vlm.layers - 1]:
            reason = "it leaves the prompt's rows before the last as they are, which a weight cannot tell from others"
            hint = "only in the last layer, layers=-1, does nothing read these rows"
        else:
            return {acting[0]: torch.full((vlm.heads,), own.suppression)}
        raise IncompatibleDecodersError(f"spin cannot be folded into weights: {reason}", hint)

    def settings(self, vlm: Checkpoint) -> Settings:
        """Returns the settings for a model: the values that were given, and the authors' for the rest."""
        config = vlm.model.config.get_text_config()
        key = (config.model_type, config.hidden_size, config.num_hidden_layers, config.num_key_value_heads)
        theirs = SETTINGS.get(key, ELSEWHERE)
        return Settings(
            kept_share=theirs.kept_share if self.kept_share is None else self.kept_share,
            suppression=theirs.suppression if self.suppression is None else self.suppression,
            layers=theirs.layers if self.layers is None else self.layers,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Suppression(AttentionEdit):
    """Computes the heads' factors for both rankings.

    A factor on a head's attention weights is the same factor on its output, so the edit works on the weights.

    Attributes:
        share: r.
        factor: alpha_s.
    """

    share: float
    factor: float
    rows: ClassVar[Rows] = "last"

    def gains(self, site: Site, looks: Tensor) -> Tensor:
        """Computes the factor of each head.

        Args:
            site: Where; a row without a picture keeps all heads.
            looks: (B, H, R, K) weights or scores, to be summed over the image keys.

        Returns:
            (B, H, R, 1), 1 for heads that are kept and alpha_s for the others.
        """
        image = site.image_keys[:, None, None, :]  # (B, 1, 1, K)
        sums = torch.where(image, looks, 0.0).sum(dim=-1)  # (B, H, R)
        own, other = sums[:, :, None], sums[:, None]  # (B, H, 1, R), (B, 1, H, R)
        number = torch.arange(site.heads, device=sums.device)
        earlier = (number[None, :] < number[:, None])[None, :, :, None]  # (1, H, H, 1)
        rank = ((other > own) | ((other == own) & earlier)).sum(dim=2)  # a sort would take long to compile
        kept = (rank < kept_heads(self.share, site.heads)) | ~image.any(dim=-1)
        return torch.where(kept, 1.0, self.factor)[..., None]


class ByAttention(Suppression, WeightEdit):
    """Ranks heads by attention to the picture: ``paper``."""

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights times the heads' factors, (B, H, R, K)."""
        return weights * self.gains(site, weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class ByScores(Suppression, ScoreEdit, WeightEdit):
    """Ranks heads by the scores, which it does not change: ``official-code``."""

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Ranks the heads, and returns the same scores."""
        site.learn("gains", self.gains(site, scores))  # (B, H, R, 1), until the weights of the same pass
        return scores

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights times the heads' factors, (B, H, R, K)."""
        return weights * site.memory.of_rows.pop("gains")
