"""PH3: silences the heads that speak from memory, so that the model speaks from the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import OutputEdit, Rows, Site
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
class PH3(Decoder):
    """Head pruning by path patching: removes heads that recall the model's memory, or heads that read the context.

    A ``patching`` profile scores each head by how far it speaks for the model's answer from memory against its answer
    from the picture: above 0 for a memory head, below 0 for a context head. The outputs of the strongest heads of one
    group, before the output projection, are multiplied by 0, at all positions and steps. Query heads are pruned each
    for itself, also where several share keys and values.

    Args:
        group: Heads to prune: ``memory``, so that the model speaks from the picture, or ``context``.
        share: k in [0, 1], how many heads to prune as a share of all the model's heads, rounded down but at least one;
            never more than the group has. The usual grid is 0.01, 0.03, 0.05, 0.07, 0.09 and 0.15, chosen on other
            pictures than those that are reported. At 0 the model is plain.
        heads: Prune these heads instead, such as ``L16H29/L26H9``; ``group`` and ``share`` then say nothing.
        profile: File with a ``patching`` profile (``vlmfix profile --profiler patching --prompt ...``); None takes the
            one that lies in the model's folder.

    *Source*: "Cutting Off the Head Ends the Conflict: A Mechanism for Interpreting and Mitigating Knowledge Conflicts
    in Language Models", Findings of ACL 2024, arXiv 2402.18154; code jinzhuoran/MConflict, which was not to be had.

    *Differs*: the paper is about text models; the picture stands for its context here, and the language prior for its
    memory. That there are two groups of heads, and that pruning one steers the model to the other, is the paper's; its
    formula for the score, and its grid for k, were not to be found, and path patching as it is usually done stands for
    them (``vlmfix/heads/profilers/patching.py``). A row without a picture keeps all heads.

    *Cost*: one pass per token; attention stays as it is. Questions about one picture do not share the pass over their
    prompts' beginning. Beams and compiled decoding work.

    Example:
        >>> PH3(share=0.03).spec()
        'ph3:group=memory,share=0.03,heads=none,profile=none'
    """

    name: ClassVar[str] = "ph3"
    source: ClassVar[Source] = Source(
        title="Cutting Off the Head Ends the Conflict",
        year=2024,
        arxiv="2402.18154",
        code="https://github.com/jinzhuoran/MConflict",
    )
    acts_on: ClassVar[str] = "head outputs"

    group: str = parameter(
        "memory", str, choices=("memory", "context"), idle=({"heads": Given},), help="which heads to prune"
    )
    share: float = parameter(
        0.05,
        float,
        low=0,
        high=1,
        search=(0.01, 0.15),
        idle=({"heads": Given},),
        help="k, pruned heads as a share of all heads",
    )
    heads: HeadList | None = parameter(None, HeadList, optional=True, help="heads to prune; none: those of the profile")
    profile: str | None = parameter(
        None,
        str,
        optional=True,
        file=True,
        idle=({"heads": Given},),
        help="file with a patching profile; none: heads.safetensors of the model",
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of all rows, or none when no head is pruned or no row has a picture."""
        pruned = self._pruned(vlm)
        if not bool(pruned.any()) or not bool(layout.tokens.any()):
            return DecodingPlan()
        return DecodingPlan(edits=(Pruning(layers=layers_with(pruned), pruned=pruned),))

    def folded(self, vlm: Checkpoint) -> dict[int, Tensor]:
        """Returns a factor of 0 for each pruned head."""
        pruned = self._pruned(vlm)
        return {layer: 1.0 - row.float() for layer, row in enumerate(pruned) if bool(row.any())}

    def _pruned(self, vlm: Checkpoint) -> Tensor:
        """Marks the pruned heads, (L, H) bool."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"ph3 cannot act: {reason}", "give heads=L16H29/L26H9, or profile=FILE")
        return marked(vlm, self.chosen(vlm))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that heads are known for the model, and exist in it."""
        if self.heads is None:
            if self.share == 0:
                return None
            if reason := why_no_profile(vlm, self.name, PROFILER, self.profile):
                return f"{reason}; add a --prompt that the model answers otherwise when it does not see the picture"
        chosen = self.chosen(vlm)
        return beyond(vlm, chosen) or (None if chosen else f"no head of the profile is a {self.group} head")

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the profile's facts, when heads come from one."""
        return {} if self.heads is not None else profile_facts(vlm, self.name, PROFILER, self.profile)

    def chosen(self, vlm: Checkpoint) -> tuple[tuple[int, int], ...]:
        """Returns (layer, head) of the heads to prune, strongest first; none when no heads of the model are known.

        Raises:
            DataError: The profile cannot be read.
            ProfileMismatchError: It was measured on another model.
        """
        if self.heads is not None:
            return self.heads.pairs
        if self.share == 0:
            return ()
        profile = profile_for(vlm, self.name, PROFILER, self.profile)
        if profile is None:
            return ()
        scores = profile.scores if self.group == "memory" else -profile.scores
        count = max(1, math.floor(self.share * scores.numel() + 1e-9))  # 0.07 of 100 is 7 whatever the last digit says
        return strongest(scores, count)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pruning(OutputEdit):
    """Switches heads off in rows that have a picture.

    Attributes:
        pruned: (L, H) bool, the heads.
    """

    pruned: Tensor
    rows: ClassVar[Rows] = "all"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"pruned"})

    def output(self, site: Site, output: Tensor) -> Tensor:
        """Returns the pruned outputs, (B, R, H, D)."""
        if site.prefill:
            site.learn("pruned", site.image_keys.any(dim=1, keepdim=True) & self.pruned[site.layer])  # (B, H)
        return torch.where(site.learned("pruned")[:, None, :, None], 0.0, output)
