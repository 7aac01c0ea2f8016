"""Amplify: scales the outputs of a few heads, the parts of a circuit, or blends their attention with the identity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import AttentionEdit, OutputEdit, Rows, Site, WeightEdit
from vlmfix.decoders.attention.chosen import beyond, layers_with, marked, strongest
from vlmfix.decoders.attention.profiled import profile_facts, profile_for, why_no_profile
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Given, HeadList, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

PROFILER = "patching"


@dataclass(frozen=True, kw_only=True)
class Amplify(Decoder):
    """Adjusts the few heads that carry a task: makes them louder or softer, or lets them look at themselves.

    With o (D,) the output of a named head before the output projection, a its row of attention, and I the row that
    gives all to the token itself:

        a <- (1 - identity) a + identity I        o <- by * o

    ``by`` above 1 strengthens the heads, 0 switches them off; it acts at all positions and steps. ``identity`` acts in
    the rows of the text behind a picture and of the answer.

    Args:
        heads: The heads, such as ``L16H29/L26H9``; None takes the ``count`` strongest context heads, those that speak
            from the picture, of the middle third of the layers, from a ``patching`` profile.
        by: Factor on the heads' outputs, at least 0; at 1 they stay.
        identity: u in [0, 1], how much of the attention becomes the identity; at 0 it stays.
        count: How many heads of the profile, at least 1.
        profile: File with a ``patching`` profile (``vlmfix profile --profiler patching --prompt ...``); None takes the
            one that lies in the model's folder.

    *Source*: "Circuit Component Reuse Across Tasks in Transformer Language Models", ICLR 2024, arXiv 2310.08744, which
    finds that two tasks share most heads of their circuits, and repairs one task by adjusting four heads in the middle
    of the model. The blend with the identity is SoftPAG's, arXiv 2506.10978, of which ``vlmfix tune --heads N`` has the
    choice of heads.

    *Differs*: the paper sets the attention of its four heads by hand, to tokens that its tasks have; a question about a
    picture has no such tokens, so the heads' outputs are scaled. SoftPAG contrasts the model with the blended one
    (diffusion transformers); here the blend itself answers. A row without a picture keeps all heads.

    *Cost*: one pass per token. Without ``identity`` attention stays as it is; with it the text rows of these layers are
    computed twice. Questions about one picture do not share the pass over their prompts' beginning. Beams and compiled
    decoding work.

    Example:
        >>> Amplify(heads=HeadList("L3H1/L4H0"), by=1.5).spec()
        'amplify:heads=L3H1/L4H0,by=1.5,identity=0.0,count=4,profile=none'
    """

    name: ClassVar[str] = "amplify"
    source: ClassVar[Source] = Source(title="Circuit Component Reuse Across Tasks", year=2024, arxiv="2310.08744")
    acts_on: ClassVar[str] = "head outputs"

    heads: HeadList | None = parameter(None, HeadList, optional=True, help="heads; none: those of the profile")
    by: float = parameter(2.0, float, low=0, high=100, search=(0.0, 3.0), help="factor on the heads' outputs")
    identity: float = parameter(
        0.0, float, low=0, high=1, search=(0.0, 1.0), help="u, how much of their attention becomes the identity"
    )
    count: int = parameter(4, int, low=1, high=10000, idle=({"heads": Given},), help="how many heads of the profile")
    profile: str | None = parameter(
        None,
        str,
        optional=True,
        file=True,
        idle=({"heads": Given},),
        help="file with a patching profile; none: heads.safetensors of the model",
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans an edit of attention and one of all rows' outputs, as far as they do anything."""
        heads = self._marked(vlm)
        if not bool(layout.tokens.any()):
            return DecodingPlan()
        edits: list[AttentionEdit] = []
        if self.identity > 0:
            edits.append(Blend(layers=layers_with(heads), marked=heads, share=self.identity))
        if self.by != 1:
            edits.append(Scaling(layers=layers_with(heads), marked=heads, factor=self.by))
        return DecodingPlan(edits=tuple(edits))

    def folded(self, vlm: Checkpoint) -> dict[int, Tensor]:
        """Returns the factor of each head.

        Raises:
            IncompatibleDecodersError: Attention is blended, which no weights can hold; or the heads are not known.
        """
        if self.identity > 0:
            raise IncompatibleDecodersError(
                f"amplify:identity={self.identity} cannot be folded into weights: it acts on attention",
                "fold it with identity=0",
            )
        heads = self._marked(vlm)
        return {layer: torch.where(row, self.by, 1.0) for layer, row in enumerate(heads.cpu()) if bool(row.any())}

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that heads are known for the model, and exist in it."""
        if self.heads is None and (reason := why_no_profile(vlm, self.name, PROFILER, self.profile)):
            return f"{reason}; add a --prompt that the model answers otherwise when it does not see the picture"
        chosen = self.chosen(vlm)
        return beyond(vlm, chosen) or (None if chosen else "no head of the profile's middle layers is a context head")

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the heads and the profile's facts, when heads come from one."""
        if self.heads is not None:
            return {}
        return {"heads": str(HeadList.of(self.chosen(vlm)))} | profile_facts(vlm, self.name, PROFILER, self.profile)

    def chosen(self, vlm: Checkpoint) -> tuple[tuple[int, int], ...]:
        """Returns (layer, head) of the heads, strongest first; none when no heads of the model are known.

        Raises:
            DataError: The profile cannot be read.
            ProfileMismatchError: It was measured on another model.
        """
        if self.heads is not None:
            return self.heads.pairs
        profile = profile_for(vlm, self.name, PROFILER, self.profile)
        if profile is None:
            return ()
        middle = torch.zeros_like(profile.scores)
        middle[vlm.layers // 3 : math.ceil(2 * vlm.layers / 3)] = -1.0
        return strongest(profile.scores * middle, self.count)  # of context heads, whose scores are below 0

    def _marked(self, vlm: Checkpoint) -> Tensor:
        """Marks the heads, (L, H) bool."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"amplify cannot act: {reason}", "give heads=L16H29/L26H9, or profile=FILE")
        return marked(vlm, self.chosen(vlm))


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaling(OutputEdit):
    """Multiplies the outputs of some heads in rows that have a picture.

    Attributes:
        marked: (L, H) bool, the heads.
        factor: The factor.
    """

    marked: Tensor
    factor: float
    rows: ClassVar[Rows] = "all"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"marked"})

    def output(self, site: Site, output: Tensor) -> Tensor:
        """Returns the scaled outputs, (B, R, H, D)."""
        if site.prefill:
            site.learn("marked", site.image_keys.any(dim=1, keepdim=True) & self.marked[site.layer])  # (B, H)
        return torch.where(site.learned("marked")[:, None, :, None], output * self.factor, output)


@dataclass(frozen=True, eq=False, kw_only=True)
class Blend(WeightEdit):
    """Blends the attention of some heads with the identity, in rows that have a picture.

    Attributes:
        marked: (L, H) bool, the heads.
        share: u, the part of the identity.
    """

    marked: Tensor
    share: float
    of_prompt: ClassVar[frozenset[str]] = frozenset({"marked"})

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the blended weights, (B, H, R, K)."""
        if site.prefill:
            site.learn("marked", site.image_keys.any(dim=1, keepdim=True) & self.marked[site.layer])  # (B, H)
        keys = torch.arange(weights.shape[-1], device=weights.device)
        itself = (site.queries[:, None, :, None] == keys).to(weights.dtype)  # (1 or B, 1, R, K)
        blended = weights + self.share * (itself - weights)
        return torch.where(site.learned("marked")[:, :, None, None], blended, weights)
