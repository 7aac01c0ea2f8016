"""Chains decoding methods: several at once, in the order in which a specification names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from torch import Tensor

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.picture.refined import PictureMemo, Refined
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.strategy import Strategy
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.language.parameters import Value
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, kw_only=True)
class Chain(Decoder):
    """Applies several methods at once: logits pass through them in order, and so do attention edits.

    Args:
        decoders: The methods, first to last.

    Raises:
        IncompatibleDecodersError: Two of them refine pictures, or one that does is not the first; two of them choose
            tokens, or one searches with beams and another does not work with them.
    """

    name: ClassVar[str] = "chain"
    source: ClassVar[Source] = Source(title="Several methods at once", year=0, arxiv="")
    acts_on: ClassVar[str] = "what its parts act on"

    decoders: tuple[Decoder, ...]

    def __post_init__(self) -> None:
        if not self.decoders:
            raise UsageError("a chain of no decoders", "name at least one, such as var+vcd")
        refiners = [place for place, decoder in enumerate(self.decoders) if decoder.refines]
        if len(refiners) > 1:
            names = " and ".join(self.decoders[place].name for place in refiners)
            raise IncompatibleDecodersError(f"{names} both refine the pictures", "use one of them")
        if refiners and refiners[0] > 0:
            name = self.decoders[refiners[0]].name
            raise IncompatibleDecodersError(f"{name} refines the pictures before decoding begins", "name it first")
        _common_strategy(self.decoders)  # which refuses two
        rows = 1 + sum(decoder.passes - 1 for decoder in self.decoders if decoder.strategy is None)
        searched = max((decoder.passes for decoder in self.decoders if decoder.strategy is not None), default=1)
        object.__setattr__(self, "refines", bool(refiners))
        object.__setattr__(self, "passes", rows * searched)
        object.__setattr__(self, "beams", all(decoder.beams for decoder in self.decoders))
        object.__setattr__(self, "compiles", all(decoder.compiles for decoder in self.decoders))

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Merges the plans of all parts."""
        merged = DecodingPlan()
        for decoder in self.decoders:
            merged = merged.merged(decoder.plan(vlm, batch, layout))
        return merged

    def refine(
        self,
        vlm: Checkpoint,
        pictures: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        memo: PictureMemo,
    ) -> list[Refined]:
        """Returns the pictures that the first part makes; no other part may refine."""
        return self.decoders[0].refine(vlm, pictures, prompts, memo)

    @property
    def waiting(self) -> int:
        """Returns those of all parts."""
        return sum(decoder.waiting for decoder in self.decoders)

    @property
    def decoding(self) -> Decoder:
        """Returns the chain without refinement."""
        return Chain(decoders=(self.decoders[0].decoding, *self.decoders[1:]))

    @property
    def strategy(self) -> Strategy | None:
        """Returns the strategy of the part that has one; None without any."""
        return _common_strategy(self.decoders)

    def check(self, vlm: Checkpoint) -> str | None:
        """Returns the first reason why a part cannot act."""
        return next((reason for decoder in self.decoders if (reason := decoder.check(vlm))), None)

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the facts of all parts, each under ``part.fact``."""
        return {
            f"{decoder.name}.{name}": value for decoder in self.decoders for name, value in decoder.facts(vlm).items()
        }

    def folded(self, vlm: Checkpoint) -> dict[int, Tensor]:
        """Returns the products of the parts' factors."""
        found: dict[int, Tensor] = {}
        for decoder in self.decoders:
            for layer, gain in decoder.folded(vlm).items():
                found[layer] = found[layer] * gain if layer in found else gain
        return found

    def removed(self, vlm: Checkpoint) -> dict[int, tuple[Tensor, ...]]:
        """Returns the parts' directions, one part after the other."""
        found: dict[int, tuple[Tensor, ...]] = {}
        for decoder in self.decoders:
            for layer, vectors in decoder.removed(vlm).items():
                found[layer] = (*found.get(layer, ()), *vectors)
        return found

    def plugins(self) -> dict[str, str]:
        """Returns those of all parts."""
        return {name: made_by for decoder in self.decoders for name, made_by in decoder.plugins().items()}

    def parameters(self) -> dict[str, Value]:
        """Returns the parameters of all parts, each under ``part.parameter``."""
        return {
            f"{decoder.name}.{name}": value for decoder in self.decoders for name, value in decoder.parameters().items()
        }

    def spec(self) -> str:
        """Writes the parts joined by ``+``."""
        return "+".join(decoder.spec() for decoder in self.decoders)


def _common_strategy(decoders: Sequence[Decoder]) -> Strategy | None:
    """Finds the strategy of several methods at once; None when none has one."""
    choosing = [decoder for decoder in decoders if decoder.strategy]
    if len(choosing) > 1:
        names = " and ".join(decoder.name for decoder in choosing)
        raise IncompatibleDecodersError(f"{names} both choose the tokens", "use one of them")
    strategy = choosing[0].strategy if choosing else None
    if strategy and strategy.num_beams > 1:
        for decoder in decoders:
            if not decoder.beams:
                raise IncompatibleDecodersError(f"{decoder.name} does not work with beam search", "use one of them")
    return strategy
