"""LocoRE: raises attention to the last few tokens while predicting the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import AttentionEdit, BiasEdit, LayerSet, Rows, ScoreEdit, Site, WeightEdit
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

STRENGTHS = {"qwen2_vl": 0.20, "qwen2_5_vl": 0.20, "qwen3_vl": 0.20}
"""Gain by ``model_type`` (table 3 of the paper for Qwen2-VL, its relatives by analogy); 0.15 for all others."""


@dataclass(frozen=True, kw_only=True)
class LocoRE(Decoder):
    """Local Coherence Reinforcement: multiplies attention to the last few tokens by ``1 + strength``.

    For the query at position q, the keys ``max(start, q - window) .. q - 1`` are boosted in every head, where
    ``start`` is the first token after the picture (``post_image``) or the first generated token (``generated``). The
    query's own column is not boosted. Three readings of where the gain enters, because the paper contradicts itself:

    - ``renorm``: softmax(z + log(1 + strength)); rows sum to 1. An additive bias, so it stays on SDPA.
    - ``post``: A * (1 + strength) after the softmax, not renormalised; rows sum to more than 1.
    - ``score``: softmax(z * (1 + strength)); a key with a negative score gets *weaker*.

    Args:
        preset: ``paper-literal`` (post_image, all layers, renorm), ``semantic`` (generated tokens only: the first
            answer token is untouched), or ``released-hook`` (layers 9 to 14 and scores, what the unfinished hook in
            the released script points at).
        strength: beta >= 0; None takes the paper's value for the model (0.15, Qwen-VL 0.20).
        window: w_s >= 0, number of boosted tokens; the paper names no value.
        mode: Where the gain enters.
        scope: Which keys count as history.
        layers: Layers to act in.

    *Source*: "Hallucination Begins Where Saliency Drops", ICLR 2026, arXiv 2601.20279, sec. 3, eq. 8-10, algorithm 2.

    *Differs*: the authors released no code for this part. The default mode is the one reading that satisfies both
    eq. 9 and the sentence after it; ``window`` and ``layers`` are this package's choice. The recommendation of "beta =
    1.2" contradicts the paper's own table 3 and is read as the factor 1 + beta.

    *Cost*: one pass per token. ``renorm`` adds a bias of one row and keeps SDPA; the other modes materialise one row
    of attention. Prefill recomputes only the row that predicts. Beams and compiled decoding work.

    Example:
        >>> LocoRE(strength=0.3).mode
        'renorm'
    """

    name: ClassVar[str] = "locore"
    source: ClassVar[Source] = Source(
        title="Local Coherence Reinforcement",
        year=2026,
        arxiv="2601.20279",
        code="https://github.com/zhangbaijin/LVLMs-Saliency",
    )
    acts_on: ClassVar[str] = "attention, additive bias"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper-literal": {"mode": "renorm", "scope": "post_image", "layers": "all"},
        "semantic": {"mode": "renorm", "scope": "generated", "layers": "all"},
        "released-hook": {"mode": "score", "scope": "post_image", "layers": "9:15"},
    }

    preset: str = parameter(
        "paper-literal", str, choices=("paper-literal", "semantic", "released-hook"), help="named set of parameters"
    )
    strength: float | None = parameter(
        None,
        float,
        low=0,
        high=10,
        optional=True,
        search=(0.02, 0.6),
        log=True,
        help="beta, gain minus one; none: the paper's for the model",
    )
    window: int = parameter(5, int, low=0, high=10**6, search=(1, 20), log=True, help="w_s, number of boosted tokens")
    mode: str = parameter(
        None,
        str,
        choices=("renorm", "post", "score"),
        search=("renorm", "post", "score"),
        help="where the gain enters",
    )
    scope: str = parameter(
        None,
        str,
        choices=("post_image", "generated"),
        search=("post_image", "generated"),
        help="which keys count as history",
    )
    layers: LayerSet = parameter(None, LayerSet, help="layers to act in")

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the rows that predict."""
        strength = self.strength
        if strength is None:
            strength = STRENGTHS.get(vlm.model.config.model_type, 0.15)
        kind = {"renorm": LocalBias, "post": LocalWeights, "score": LocalScores}[self.mode]
        edit = kind(layers=self.layers, gain=1 + strength, size=self.window, generated=self.scope == "generated")
        return DecodingPlan(edits=(edit,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Local(AttentionEdit):
    """Finds the boosted window of the row that predicts, for all three places of the gain.

    Attributes:
        gain: 1 + beta.
        size: w_s, keys before the query.
        generated: History starts with the first generated token, not after the picture.
    """

    gain: float
    size: int
    generated: bool
    rows: ClassVar[Rows] = "last"

    def window(self, site: Site) -> Tensor:
        """Marks the boosted keys of each query, (B, 1, R, K) bool.

        Keys that a query does not see, such as columns that a search has taken back, take no room in the window.
        """
        key = torch.arange(site.allowed.shape[-1], device=site.queries.device)
        here = key == site.queries[:, None, :, None]  # (1 or B, 1, R, K)
        seen = site.allowed.cumsum(dim=-1)  # (1 or B, 1, R, K)
        behind = torch.where(here, seen, 0).sum(dim=-1, keepdim=True) - seen  # keys up to the query's own
        if site.prefill:
            site.learn("start", self._start(site, key))
        start = site.learned("start")[:, None, None, None]  # (B, 1, 1, 1)
        return (key >= start) & (behind > 0) & (behind <= self.size)

    def _start(self, site: Site, key: Tensor) -> Tensor:
        """Returns history's first key, (B,): after the row's last image token, or without a picture its first token."""
        if self.generated:
            return key.new_full((site.image_keys.shape[0],), site.prompt)
        after = torch.where(site.image_keys, key + 1, 0).amax(dim=1)
        first = torch.where(site.text_keys, key, site.prompt).amin(dim=1)
        return torch.where(after > 0, after, first)


class LocalBias(Local, BiasEdit):
    """Adds log(gain) to the scores of the window: ``renorm``."""

    def bias(self, site: Site) -> Tensor:
        """Returns the bias, (B, 1, R, K)."""
        return torch.where(self.window(site), math.log(self.gain), 0.0)


class LocalWeights(Local, WeightEdit):
    """Multiplies the window's weights by the gain, without renormalising: ``post``."""

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the boosted weights, (B, H, R, K)."""
        return torch.where(self.window(site), weights * self.gain, weights)


class LocalScores(Local, ScoreEdit):
    """Multiplies the window's scaled scores by the gain: ``score``."""

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Returns the boosted scores, (B, H, R, K)."""
        return torch.where(self.window(site), scores * self.gain, scores)
