"""DeCo: adds the logits of the early layer that is surest of one of the likely tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.exits import Exit
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

SHARE = (20 / 32, 28 / 32)
"""First and last of the authors' layers, 20 to 28 of 32, as shares of the depth."""


def candidates(logits: Tensor, nucleus: float, most: int) -> Tensor:
    """Marks the most probable tokens, at most ``most``, that come to ``nucleus`` of the probability together.

    Args:
        logits: (B, V).
        nucleus: In [0, 1]; the token that crosses it counts, so there is always one.
        most: Number of tokens.

    Returns:
        (B, V) bool.
    """
    share, order = logits.softmax(dim=-1).topk(min(most, logits.shape[-1]), dim=-1)
    before = share.cumsum(dim=-1) - share
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < max(nucleus, 1e-9))


@dataclass(frozen=True, kw_only=True)
class DeCo(Decoder):
    """Dynamic Correction: models often see an object in a middle layer and talk themselves out of it behind.

    Candidates are the tokens of the last layer's nucleus. Among ``layers`` the one is taken, for each row and token,
    that gives some candidate the highest probability p of all; its logits, times ``strength * p``, are added to the
    last layer's. Tokens that are no candidates are cut.

    Args:
        strength: alpha >= 0.
        layers: Layers that have been passed, in numbers: 20 is the stream behind 20 layers. None takes the authors' 20
            to 28 of 32, as shares of the model's depth.
        nucleus: top-p of the candidates, in (0, 1]; the token that crosses it is one.
        candidates: Most candidates.

    *Source*: Wang et al., "MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation", ICLR 2025, arXiv
    2410.11779; code zjunlp/DeCo. Its README has strength 0.6 in the commands and 0.5 in the table of arguments.

    *Differs*: the released code takes one row and a model of 32 layers or more; here each row has its own layer and
    candidates, and the layers scale with the depth.

    *Cost*: one pass per token, and the output head once more for each layer.

    Example:
        >>> DeCo(layers="1:3").spec()
        'deco:strength=0.6,layers=1:3,nucleus=0.9,candidates=20'
    """

    name: ClassVar[str] = "deco"
    source: ClassVar[Source] = Source(
        title="Dynamic Correction Decoding", year=2025, arxiv="2410.11779", code="https://github.com/zjunlp/DeCo"
    )
    acts_on: ClassVar[str] = "logits of early layers"
    compiles: ClassVar[bool] = False

    strength: float = parameter(0.6, float, low=0, high=10, search=(0.05, 2.0), log=True, help="alpha")
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="in layers passed; none: 20 to 28 of 32, by depth"
    )
    nucleus: float = parameter(0.9, float, low=0, high=1, search=(0.5, 1.0), help="top-p of the candidates")
    candidates: int = parameter(20, int, low=1, high=1000, help="most candidates")

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the correction, for every row."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"deco cannot act: {reason}", "give layers that the model has")
        rule = Correction(
            branches=(),
            rows=layout.tokens.new_ones(batch.rows),
            exits=tuple(Exit(number, normed=True) for number in self.places(vlm)),
            strength=self.strength,
            nucleus=self.nucleus,
            most=self.candidates,
        )
        return DecodingPlan(contrasts=(rule,))

    def places(self, vlm: Checkpoint) -> list[int]:
        """Returns how many layers have been passed at each exit."""
        if self.layers is not None:
            return sorted(self.layers.resolve(vlm.layers))
        first, last = (round(share * vlm.layers) for share in SHARE)
        return list(range(max(first, 1), min(last, vlm.layers - 1) + 1))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that there is an early layer."""
        return None if self.places(vlm) else f"the model's {vlm.layers} layers have none there"


@dataclass(frozen=True, eq=False, kw_only=True)
class Correction(Contrast):
    """Adds the logits of the surest early layer.

    Attributes:
        strength: alpha.
        nucleus: top-p of the candidates.
        most: How many they are at most.
    """

    strength: float
    nucleus: float
    most: int
    steps_alike: ClassVar[bool] = False

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + strength * p * early``, and -inf where a token is no candidate."""
        chosen = candidates(clean, self.nucleus, self.most)  # (B, V)
        sure = others.softmax(dim=-1).where(chosen, 0.0).amax(dim=-1)  # (E, B)
        best, layer = sure.max(dim=0)  # (B,)
        early = others[layer, torch.arange(len(clean), device=clean.device)]
        return (scores + self.strength * best[:, None] * early).where(chosen, -torch.inf)
