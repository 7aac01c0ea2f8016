"""Describes what one call of a decoder does: edits of attention and vision tower, branches, and a gate on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from transformers import LogitsProcessor

from vlmfix.attention.edit import AttentionEdit, CacheEdit, LayerSet, PromptCacheEdit
from vlmfix.attention.tower import TowerEdit
from vlmfix.decoding.branches import Branch, Contrast
from vlmfix.decoding.choice import Gated
from vlmfix.decoding.exits import Exit
from vlmfix.decoding.newest import Newest
from vlmfix.errors import IncompatibleDecodersError

if TYPE_CHECKING:  # which make plans work, and know them
    from vlmfix.decoding.beams import Course
    from vlmfix.decoding.running import Running


class Gate(Protocol):
    """Chooses tokens for a method that rejects some, in place of greedy search or sampling."""

    def __call__(self, newest: Newest | None, processors: Sequence[LogitsProcessor], *, sampling: bool) -> Gated:
        """Starts a call, and returns what chooses its tokens.

        Args:
            newest: The call's newest step with its graph, when the plan asks for it.
            processors: Processors of the scores; a ``RowSampler`` among them says that tokens are drawn.
            sampling: Whether tokens are to be drawn from the processed scores.

        Raises:
            IncompatibleDecodersError: The gate cannot choose in that way.
        """


class Leader(Protocol):
    """Leads a beam search for a method that scores tokens, or goes back to earlier ones, in a way of its own."""

    @property
    def reader(self) -> AttentionEdit:
        """Returns the edit of the plan that reads attention; in a chain it comes behind those of the other methods."""

    @property
    def rows(self) -> int:
        """Returns how many rows of a pass each beam has."""

    def __call__(self, call: Running) -> Course:
        """Starts a call, and returns what leads its search."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingPlan:
    """Holds what one call of ``generate`` needs; each call gets a new plan, which may hold that call's state.

    Attributes:
        edits: Attention edits, in order.
        tower: Edits of the vision tower, in order; they act on the pictures of all rows, those of branches too.
        contrasts: Contrast branches and how their logits are fused, in order.
        gate: Chooses the tokens, at most one in a chain; None leaves that to greedy search, sampling or beams.
        leader: Leads the beam search, at most one in a chain; None leaves it to the scores.
        asks: Layers whose saliency the gate reads; None when it reads none.
        beams: Whether beam search is meaningful.
        compiles: Whether edits can be recorded and compiled; False for those with effects in Python at every step.
    """

    edits: tuple[AttentionEdit, ...] = ()
    tower: tuple[TowerEdit, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    gate: Gate | None = None
    leader: Leader | None = None
    asks: LayerSet | None = None
    beams: bool = True
    compiles: bool = True

    @property
    def steps_alike(self) -> bool:
        """Returns whether all decoding steps are the same computation, fusion of logits included."""
        return self.compiles and all(contrast.steps_alike for contrast in self.contrasts)

    @property
    def branches(self) -> list[Branch]:
        """Returns the branches of all contrasts, in the order of their rows."""
        return [branch for contrast in self.contrasts for branch in contrast.branches]

    @property
    def every_edit(self) -> tuple[AttentionEdit, ...]:
        """Returns all edits, those of branches included."""
        return self.edits + tuple(edit for branch in self.branches for edit in branch.edits)

    @property
    def views(self) -> tuple[Exit, ...]:
        """Returns the places at which rules look at the prompt's columns; its pass is then whole."""
        return tuple(place for contrast in self.contrasts for place in contrast.views)

    @property
    def plain(self) -> bool:
        """Returns whether the plan leaves the model as it is."""
        changes = self.edits or self.tower or self.contrasts
        return not changes and self.gate is None and self.leader is None

    def merged(self, other: DecodingPlan) -> DecodingPlan:
        """Returns a plan that applies this plan first and then the other.

        Raises:
            IncompatibleDecodersError: Both have a gate; one edits the KV cache and the other asks for saliency or goes
                back to earlier tokens; one edits a prompt's rows together and the other asks for saliency; or one
                counts steps that the other's search goes back.
        """
        if self.gate is not None and other.gate is not None:
            raise IncompatibleDecodersError("both decoders choose tokens in a way of their own", "use one of them")
        edits, asks = self.edits + other.edits, self.asks or other.asks
        leader, contrasts = self.leader or other.leader, self.contrasts + other.contrasts
        if any(isinstance(edit, CacheEdit) for edit in edits) and (asks is not None or leader is not None):
            does = "asks for gradients through it" if leader is None else "goes back to what it was before"
            raise IncompatibleDecodersError(f"one decoder edits the KV cache, and another {does}", "use one of them")
        if asks is not None and any(edit.together for edit in edits):
            raise IncompatibleDecodersError(
                "one decoder edits a prompt's tokens together, and another lets the last of them pass again alone",
                "use one of them",
            )
        if asks is not None and any(isinstance(edit, PromptCacheEdit) for edit in edits):
            raise IncompatibleDecodersError(
                "one decoder edits the KV cache, and another asks for gradients through it", "use one of them"
            )
        if leader is not None and any(contrast.counts for contrast in contrasts):
            raise IncompatibleDecodersError(
                "a search that goes back to earlier tokens, as opera does, and scores that depend on their number",
                "leave one out: m3id and flb count their steps, most other decoders do not",
            )
        reader = None if leader is None else leader.reader
        return DecodingPlan(
            edits=tuple(sorted(edits, key=lambda edit: edit is reader)),
            tower=self.tower + other.tower,
            contrasts=contrasts,
            gate=self.gate or other.gate,
            leader=leader,
            asks=asks,
            beams=self.beams and other.beams,
            compiles=self.compiles and other.compiles,
        )
