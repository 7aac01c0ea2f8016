"""Samples: draws every token from the model's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmfix.asked import MOST
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.strategy import Strategy
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, kw_only=True)
class Sample(Decoder):
    """Draws every token from the model's distribution: ``p_i ~ exp(s_i / temperature)`` over the nucleus.

    The nucleus is the smallest set of the most probable tokens that together have ``top_p``, of the ``top_k`` most
    probable ones where that is given. In a chain it says how tokens are chosen from the scores that the other methods
    make, and its place does not matter; ``sample`` and ``beam`` do not go together.

    Args:
        temperature: In [0, 100]; 1 is the model's own distribution, 0 takes the most probable token.
        top_p: Share of the nucleus, in (0, 1]; 1 is the whole vocabulary.
        top_k: How many of the most probable tokens are drawn from, those of equal scores included; 0 for all.

    *Source*: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, for the nucleus. The
    defaults are what comparisons of these methods call direct sampling.

    *Differs*: ``VLM.generate`` and the command line draw with a generator per row, made of their seed, the question and
    the pixels, so that a row's answer does not depend on its neighbours. With ``applied`` and the model's own
    ``generate``, transformers draws, from torch's global generator.

    *Cost*: one pass per token. Compiled decoding works.

    Example:
        >>> Sample(temperature=0.7).spec()
        'sample:temperature=0.7,top_p=1.0,top_k=0'
    """

    name: ClassVar[str] = "sample"
    source: ClassVar[Source] = Source(title="Plain decoding, sampled", year=0, arxiv="")
    acts_on: ClassVar[str] = "choice of tokens"
    beams: ClassVar[bool] = False

    temperature: float = parameter(1.0, float, low=0, high=100, search=(0.1, 1.5), help="0 takes the most probable")
    top_p: float = parameter(1.0, float, low=0, high=1, search=(0.5, 1.0), help="share of the nucleus, above 0")
    top_k: int = parameter(0, int, low=0, high=MOST, help="draws from so many most probable tokens; 0: from all")

    def __post_init__(self) -> None:
        super().__post_init__()
        Strategy(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    @property
    def strategy(self) -> Strategy:
        """Returns sampling as the strategy."""
        return Strategy(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Returns an empty plan."""
        return DecodingPlan()
