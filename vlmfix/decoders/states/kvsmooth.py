"""KVSmooth: smooths the keys and values that generated tokens leave in the KV cache, most where attention was vague."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import CacheEdit, Column, LayerSet, Site
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream.positions import frequencies


def inner(count: int) -> LayerSet:
    """Returns, of a model with ``count`` layers, those that 3 to 30 are of 32; the only one of a single layer."""
    first = round(3 / 32 * count)
    return LayerSet(f"{first}:{max(count - 1, first + 1)}")


@dataclass(frozen=True, kw_only=True)
class KVSmooth(Decoder):
    """Key-value smoothing: mixes each generated token's key and value with those that the cache has of the one before.

    With ``z`` the entropy of the token's row of attention in a layer, mean over heads, and ``r`` the share of the last
    ``window`` values of z in that layer, this one included, that are not above it: ``s = clip(r, strength - spread,
    strength + spread)``, within [0, 1]. Then the cache keeps ``(1 - s) * K + s * K'`` with K' what it has of the token
    before, smoothed already, and the same of V. The token's own row is computed with K and V as they are, since its
    entropy must be known first; later rows see what is kept.

    Args:
        preset: Whose strength: ``llava`` (0.9), ``instructblip`` (0.7) or ``minigpt4`` (0.5).
        strength: lambda_ref in [0, 1], in the middle of what s can be.
        spread: How far s may be from it; 0 smooths every token alike.
        window: M, values of the entropy that one is compared with; fewer at the beginning of an answer.
        entropy: ``heads``, the mean of the heads' entropies, or ``mean``, the entropy of the mean over heads.
        layers: Layers to act in. None takes the authors' 3 to 30 of 32, as shares of the model's depth.
        rotary: Whether keys are mixed as the cache holds them, ``behind`` the rotary embedding, or as they were
            ``before`` it; then the key of the token before is turned on by one place.

    *Source*: "KVSmooth", CVPR 2026, arXiv 2602.04268; there is no released code, and the paper was read in a detailed
    account of it.

    *Differs*: the account leaves open over which heads the entropy runs (``entropy``), whether a token's own row sees
    what is kept of it (here it does not), and whether keys are smoothed before the rotary embedding (``rotary``). The
    first token is mixed with the prompt's last. Contrast rows keep their cache as it is.

    *Cost*: one row of attention is computed from its weights in each of these layers.

    Example:
        >>> KVSmooth(preset="minigpt4").spec()
        'kvsmooth:preset=minigpt4,strength=0.5,spread=0.2,window=15,entropy=heads,layers=none'
    """

    name: ClassVar[str] = "kvsmooth"
    source: ClassVar[Source] = Source(title="Key-value smoothing", year=2026, arxiv="2602.04268")
    acts_on: ClassVar[str] = "the KV cache"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "llava": {"strength": 0.9},
        "instructblip": {"strength": 0.7},
        "minigpt4": {"strength": 0.5},
    }

    preset: str = parameter("llava", str, choices=("llava", "instructblip", "minigpt4"), help="whose strength")
    strength: float = parameter(
        None,
        float,
        low=0,
        high=1,
        search=(0.1, 0.95),
        help="lambda_ref, the middle of what is taken of the token before",
    )
    spread: float = parameter(0.2, float, low=0, high=1, search=(0.0, 0.5), help="how far a token may be from it")
    window: int = parameter(
        15, int, low=1, high=1000, idle=({"spread": 0.0},), help="M, tokens whose entropies are compared"
    )
    entropy: str = parameter(
        "heads",
        str,
        choices=("heads", "mean"),
        idle=({"spread": 0.0},),
        help="mean of heads' entropies, or that of the mean",
    )
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="layers to act in; none: 3 to 30 of 32, by depth"
    )
    rotary: str = parameter(
        "behind", str, choices=("behind", "before"), later=True, help="where keys are mixed, by the rotary embedding"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the cache."""
        angles = None
        if self.rotary == "before":
            decoder = vlm.family.decoder(vlm.model)
            each = [frequencies(decoder, module) for module in vlm.family.attention_modules(vlm.model)]
            angles = torch.stack([one.to(vlm.device) for one in each])
        edit = Smoothed(
            angles=angles,
            turns=angles is not None,
            layers=self.layers or inner(vlm.layers),
            low=max(self.strength - self.spread, 0.0),
            high=min(self.strength + self.spread, 1.0),
            window=self.window,
            heads=self.entropy == "heads",
        )
        return DecodingPlan(edits=(edit,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Smoothed(CacheEdit):
    """Mixes the newest token's key and value with those before it.

    Attributes:
        low: Smallest share that is taken of the token before.
        high: Largest.
        window: M.
        heads: Whether entropies are averaged over heads, or the heads' rows.
        turns: Whether the key before is turned on by one place.
        angles: (L, D / 2) float32, the angles of one place in each layer, where it is.
    """

    low: float
    high: float
    window: int
    heads: bool
    turns: bool = False
    angles: Tensor | None = None
    of_prompt: ClassVar[frozenset[str]] = frozenset({"angles"})

    def begin(self, site: Site) -> None:
        """Begins with no entropy, which +inf stands for."""
        rows = site.image_keys.shape[0]
        site.learn_of_steps("entropies", torch.full((rows, self.window), math.inf, device=site.image_keys.device))
        if self.angles is not None:
            site.learn("angles", self.angles[site.layer].expand(rows, -1))

    def kept(self, site: Site, weights: Tensor, newest: Column, before: Column) -> Column:
        """Returns the smoothed key and value."""
        entropy = self._entropy(weights)  # (B,)
        last = torch.cat([site.learned("entropies")[:, 1:], entropy[:, None]], dim=1)  # (B, M)
        site.relearn("entropies", last)
        share = (last <= entropy[:, None]).sum(dim=1) / last.isfinite().sum(dim=1)
        taken = share.clamp(self.low, self.high)[:, None, None, None]  # (B, 1, 1, 1)
        if self.turns:
            keys = turned_on(before.keys.float(), site.learned("angles")[:, None, None])
            before = Column(keys, before.values)
        mixed = [(1 - taken) * new.float() + taken * old.float() for new, old in zip(newest, before, strict=True)]
        return Column(*mixed)

    def _entropy(self, weights: Tensor) -> Tensor:
        rows = weights if self.heads else weights.mean(dim=1, keepdim=True)  # (B, H or 1, 1, K)
        logs = rows.clamp(min=torch.finfo(rows.dtype).tiny).log()  # 0 where the row does not look
        return -(rows * logs).sum(dim=-1).mean(dim=(1, 2))


def turned_on(keys: Tensor, angles: Tensor) -> Tensor:
    """Turns keys (..., D) on by angles (..., D / 2), as a rotary embedding does: dimension i with i + D / 2."""
    one, other = keys.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
