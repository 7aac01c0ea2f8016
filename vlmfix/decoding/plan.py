"""What one call of a decoder does: edits of attention, branches, and a loop of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from vlmfix.attention.edit import AttentionEdit
from vlmfix.decoding.branches import Contrast
from vlmfix.errors import IncompatibleDecodersError


class DecodingLoop(Protocol):
    """A loop of its own, handed to ``generate`` as ``custom_generate``: for methods that reject or roll back."""

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:  # noqa: ANN401 (two kinds)
        """Generates from prepared inputs; see transformers' ``custom_generate``.

        Returns:
            (B, T + generated) tokens, or an output of ``generate`` when its configuration asks for one.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingPlan:
    """What one call of ``generate`` needs; made anew for every call, because it may hold that call's state.

    Attributes:
        edits: Attention edits, in order.
        contrasts: Branches and how their logits are fused, in order.
        loop: A decoding loop of its own, at most one in a chain.
        beams: Whether beam search is meaningful.
        compiles: Whether decoding steps can be compiled; False for plans with per-step Python effects.
    """

    edits: tuple[AttentionEdit, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    loop: DecodingLoop | None = None
    beams: bool = True
    compiles: bool = True

    @property
    def plain(self) -> bool:
        """Whether it leaves the model as it is."""
        return not self.edits and not self.contrasts and self.loop is None

    def merged(self, other: DecodingPlan) -> DecodingPlan:
        """Both plans at work: this one first.

        Raises:
            IncompatibleDecodersError: Both bring a decoding loop.
        """
        if self.loop is not None and other.loop is not None:
            raise IncompatibleDecodersError("both decoders bring a decoding loop of their own", "use one of them")
        return DecodingPlan(
            edits=self.edits + other.edits,
            contrasts=self.contrasts + other.contrasts,
            loop=self.loop or other.loop,
            beams=self.beams and other.beams,
            compiles=self.compiles and other.compiles,
        )
