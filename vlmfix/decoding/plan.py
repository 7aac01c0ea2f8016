"""What one call of a decoder does: edits of attention, branches, and a gate on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import LogitsProcessor

from vlmfix.attention.edit import AttentionEdit, LayerSet
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.choice import Gated
from vlmfix.decoding.newest import Newest
from vlmfix.errors import IncompatibleDecodersError


class Gate(Protocol):
    """Chooses tokens in a way of its own: for methods that reject some."""

    def __call__(self, newest: Newest | None, processors: Sequence[LogitsProcessor], *, sampling: bool) -> Gated:
        """Begins a call.

        Args:
            newest: What the call's newest step owes, when the plan asks for it.
            processors: What shapes the scores; a ``RowSampler`` among them says that tokens are drawn.
            sampling: Whether tokens are to be drawn from the shaped scores.

        Raises:
            IncompatibleDecodersError: It chooses otherwise than it is told to.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingPlan:
    """What one call of ``generate`` needs; made anew for every call, because it may hold that call's state.

    Attributes:
        edits: Attention edits, in order.
        contrasts: Branches and how their logits are fused, in order.
        gate: A way of its own to choose tokens, at most one in a chain.
        asks: Layers of which the gate asks what tokens owe to them; None when it asks nothing.
        beams: Whether beam search is meaningful.
        compiles: Whether decoding steps can be compiled; False for plans with per-step Python effects.
    """

    edits: tuple[AttentionEdit, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    gate: Gate | None = None
    asks: LayerSet | None = None
    beams: bool = True
    compiles: bool = True

    @property
    def plain(self) -> bool:
        """Whether it leaves the model as it is."""
        return not self.edits and not self.contrasts and self.gate is None

    def merged(self, other: DecodingPlan) -> DecodingPlan:
        """Both plans at work: this one first.

        Raises:
            IncompatibleDecodersError: Both bring a gate.
        """
        if self.gate is not None and other.gate is not None:
            raise IncompatibleDecodersError("both decoders choose tokens in a way of their own", "use one of them")
        return DecodingPlan(
            edits=self.edits + other.edits,
            contrasts=self.contrasts + other.contrasts,
            gate=self.gate or other.gate,
            asks=self.asks or other.asks,
            beams=self.beams and other.beams,
            compiles=self.compiles and other.compiles,
        )
