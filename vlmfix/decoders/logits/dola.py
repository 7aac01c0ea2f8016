"""DoLa: contrasts the last layer's distribution with that of the early layer which differs most from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.exits import Exit
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Given, Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

DEEP = 40
"""Layers above which a bucket has no more than its half of them."""


def distances(last: Tensor, early: Tensor, *, swapped: bool) -> Tensor:
    """Measures how far each layer's distribution is from the last layer's.

    Args:
        last: (B, V) log-probabilities.
        early: (E, B, V) log-probabilities.
        swapped: False for the Jensen-Shannon divergence in nats; True for the released code's number.

    Returns:
        (E, B).
    """
    middle = torch.logaddexp(last, early) - math.log(2)  # (E, B, V); not by way of probabilities, of which some are 0
    if swapped:  # means of "divergences" of the mean distribution from each, weighted by the mean one
        pairs = [(middle.exp() * (middle - other)).mean(dim=-1) for other in (last, early)]
    else:
        pairs = [
            torch.where(other > -torch.inf, other.exp() * (other - middle), 0.0).sum(-1) for other in (last, early)
        ]
    return (pairs[0] + pairs[1]) / 2


@dataclass(frozen=True, kw_only=True)
class DoLa(Decoder):
    """Decoding by Contrasting Layers: subtracts the log-probabilities that an early layer would give.

    What a layer would give is the output head applied to its residual stream. Of the layers in a bucket the one is
    taken, for each row and token, whose distribution is furthest from the last layer's (Jensen-Shannon divergence):
    what changes in the layers behind it is taken for knowledge. Then tokens are cut whose probability in the last
    layer is below ``plausibility`` times the largest.

    Args:
        preset: The bucket: ``low``, every second of the first half of the layers (for short answers), or ``high``,
            every second of the second half.
        layers: The bucket in numbers, as layers that have been passed: 0 are the embeddings, 16 the stream behind 16
            layers. None takes the preset's.
        plausibility: relative_top in [0, 1]; 0 cuts nothing.
        distance: ``divergence``, or ``official-code``: the released code swaps the arguments of the divergence and
            averages over the vocabulary, which ranks layers otherwise.

    *Source*: Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models", ICLR
    2024, arXiv 2309.03883; code voidism/DoLa.

    *Differs*: the released code averages the distance over the batch and takes one layer for all rows; here each row
    has its own in either distance. The last norm does not come before the head at early layers, as released.

    *Cost*: one pass per token, and the output head once more for each layer of the bucket.

    Example:
        >>> DoLa(preset="high").spec()
        'dola:preset=high,layers=none,plausibility=0.1,distance=divergence'
    """

    name: ClassVar[str] = "dola"
    source: ClassVar[Source] = Source(
        title="Decoding by Contrasting Layers", year=2024, arxiv="2309.03883", code="https://github.com/voidism/DoLa"
    )
    acts_on: ClassVar[str] = "logits of early layers"
    compiles: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {"low": {}, "high": {}}

    preset: str = parameter(
        "low",
        str,
        choices=("low", "high"),
        search=("low", "high"),
        idle=({"layers": Given},),
        help="bucket of layers",
    )
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="bucket, in layers passed; none: the preset's"
    )
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="cut below this share of the best token"
    )
    distance: str = parameter(
        "divergence", str, choices=("divergence", "official-code"), help="how a layer's distance is measured"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the contrast, for every row."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"dola cannot act: {reason}", "give layers that the model has")
        rule = LayerContrast(
            branches=(),
            rows=layout.tokens.new_ones(batch.rows),
            exits=tuple(Exit(number, normed=False) for number in self.bucket(vlm)),
            plausibility=self.plausibility,
            swapped=self.distance == "official-code",
        )
        return DecodingPlan(contrasts=(rule,))

    def bucket(self, vlm: Checkpoint) -> list[int]:
        """Returns how many layers have been passed at each exit."""
        count = vlm.layers
        if self.layers is not None:
            return sorted(self.layers.resolve(count))
        first = min(2, count - 1) if is_tied(vlm) else 0  # a tied head reads the token itself off the embeddings
        if self.preset == "low":  # whose first half may be no more than the layer that it begins with
            return list(range(first, count // 2 if count <= DEEP else DEEP // 2, 2)) or [first]
        return list(range(count // 2 if count <= DEEP else count - 20, count, 2))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the bucket holds a layer."""
        return None if self.bucket(vlm) else f"none of the model's {vlm.layers} layers is in the bucket"


def is_tied(vlm: Checkpoint) -> bool:
    """Returns whether the output head's weights are those of the embeddings."""
    head, embeddings = vlm.model.get_output_embeddings(), vlm.model.get_input_embeddings()
    return getattr(head, "weight", None) is embeddings.weight


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerContrast(Contrast):
    """Pushes the scores away from the early layer that is furthest from the last.

    Attributes:
        plausibility: relative_top.
        swapped: Whether the distance is the released code's.
    """

    plausibility: float
    swapped: bool
    steps_alike: ClassVar[bool] = False

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``log p_last - log p_early``, cut by the clean logits."""
        early = others.log_softmax(dim=-1)  # (E, B, V)
        chosen = distances(clean.log_softmax(dim=-1), early, swapped=self.swapped).argmax(dim=0)  # (B,)
        furthest = early[chosen, torch.arange(len(clean), device=clean.device)]
        return cut(clean, scores.log_softmax(dim=-1) - furthest, self.plausibility)
