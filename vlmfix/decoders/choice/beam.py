"""Beam search: keeps the most probable answers so far, and not only the best one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.strategy import Strategy
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

BEAMS = 5
"""Number of beams that comparisons on CHAIR commonly use."""


@dataclass(frozen=True, kw_only=True)
class Beam(Decoder):
    """The model as it is, searched with beams: the answer with the largest mean log-probability per token.

    In a chain it searches over the scores that the other methods make, and its place does not matter; methods that do
    not work with beams are refused, and so is ``sample``.

    Args:
        num_beams: Beams, 1 to 100; 1 takes the most probable token at every step.

    *Source*: transformers' beam search, with its length penalty of 1.

    *Cost*: ``num_beams`` rows per token and per prompt; the beams of a row share its prompt. Compiled decoding works.

    Example:
        >>> Beam(num_beams=4).spec()
        'beam:num_beams=4'
    """

    name: ClassVar[str] = "beam"
    source: ClassVar[Source] = Source(title="Plain decoding, beam search", year=0, arxiv="")
    acts_on: ClassVar[str] = "choice of tokens"
    passes: ClassVar[int] = BEAMS

    num_beams: int = parameter(BEAMS, int, low=1, high=100, search=(1, 8), help="beams; 1 is greedy search")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "passes", self.num_beams)

    @property
    def strategy(self) -> Strategy:
        """Returns beam search as the strategy."""
        return Strategy(num_beams=self.num_beams)

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Returns an empty plan."""
        return DecodingPlan()
