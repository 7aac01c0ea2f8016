"""AD-HH: removes the attention to text of heads that push hallucinated words, whenever they mostly read text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Rows, Site, WeightEdit
from vlmfix.decoders.attention.chosen import beyond, layers_with, marked, strongest
from vlmfix.decoders.attention.profiled import profile_facts, profile_for, why_no_profile
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Given, HeadList, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

PUBLISHED: dict[tuple[str, str, int, int], HeadList] = {
    ("llava", "llama", 4096, 32): HeadList(
        "L16H29/L26H9/L13H31/L15H10/L20H12/L30H9/L19H18/L17H0/L18H9/L26H28/L19H27/L18H26/L15H25/L14H16/L31H26/L15H24/"
        "L31H3/L22H20/L27H29/L17H28"
    ),
    ("llava", "llama", 5120, 40): HeadList(
        "L0H8/L29H27/L23H18/L20H11/L36H26/L19H37/L22H16/L22H34/L21H31/L20H34/L37H11/L17H25/L35H10/L17H5/L15H26/L0H22/"
        "L19H5/L19H0/L14H1/L23H20/L21H6/L30H24/L26H27/L21H32/L15H28/L15H31/L19H30/L20H8/L19H14/L14H9/L39H26/L25H1/"
        "L18H32/L17H27/L39H32"
    ),
    ("llava_next", "llama", 7168, 60): HeadList("L45H34/L43H4/L43H48/L44H29/L35H47/L40H27/L54H34/L37H48/L43H2/L41H34"),
}
"""The authors' hallucination heads, strongest first, by the types of model and text model, hidden size and layers:
LLaVA-1.5-7B, LLaVA-1.5-13B and LLaVA-1.6-34B."""
PROFILER = "ablation"
SHARE = 20 / 1024
"""Share of all heads that the authors use in LLaVA-1.5-7B; in the 13B it is 35 of 1600."""


@dataclass(frozen=True, kw_only=True)
class ADHH(Decoder):
    """Adaptive deactivation of hallucination heads: removes their attention to text wherever they mostly read text.

    For the row that predicts, at every step and in each hallucination head h, after the softmax:

        t[h] = sum of A[h, j] over the text j behind the picture: the question, the template's end, generated tokens
        A[h, j] = 0 for these j   where t[h] >= threshold

    Nothing is renormalised: the head loses that part of its output. Rows of the prompt before the last one, and what
    comes before the picture, keep their attention.

    Args:
        heads: Hallucination heads, such as ``L16H29/L26H9``; None takes those of ``profile``, or the published list,
            or those of the profile that lies in the model's folder, whichever is there first.
        count: How many of these, strongest first; None takes all that are listed (LLaVA-1.5-7B 20, LLaVA-1.5-13B 35,
            LLaVA-1.6-34B 10), and of a profile 20 in 1024 of the model's heads, at least one (not in the paper). Heads
            of a profile that do not push hallucinated words are never taken.
        threshold: theta >= 0; the authors' is 0.4, and 0.5 in their comparison with other methods. At 0 the heads
            never see the text, above 1 the model is plain.
        profile: File with an ``ablation`` profile of captions with annotations, in which a high score is a head that
            pushes hallucinated words more than real ones (``vlmfix profile --profiler ablation --instances ...``). One
            of next tokens says another thing and is refused.

    *Source*: Yang, Li, Cao, Xu, "Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular
    Attribution and Intervention", ICLR 2025, OpenReview Bjq4W7P2Us; code TianyunYoung/Hallucination-Attribution.

    *Differs*: the release knows the picture's place by fixed numbers for three models; here it is found, per row. Of
    several pictures in a row the last one counts: text between pictures is left alone. Heads are query heads also where
    keys and values are shared. A row without a picture is decoded plainly. The fine-tuned variant is not reproduced.

    *Cost*: one pass per token. One row of attention per head is materialised in the layers that have such heads.
    Beams and compiled decoding work.

    Example:
        >>> ADHH(heads="L1H3/L2H0", threshold=0.5).spec()
        'adhh:heads=L1H3/L2H0,count=none,threshold=0.5,profile=none'
    """

    name: ClassVar[str] = "adhh"
    source: ClassVar[Source] = Source(
        title="Adaptive Deactivation of Hallucination Heads",
        year=2025,
        arxiv="",
        code="https://github.com/TianyunYoung/Hallucination-Attribution",
    )
    acts_on: ClassVar[str] = "attention weights"

    heads: HeadList | None = parameter(
        None, HeadList, optional=True, help="heads to act in; none: published for the model, or of a profile"
    )
    count: int | None = parameter(
        None,
        int,
        low=1,
        high=10**6,
        optional=True,
        search=(1, 40),
        help="how many; none: all of a list, 2 % of a profile",
    )
    threshold: float = parameter(
        0.4, float, low=0, high=2, search=(0.0, 0.9), help="theta, attention to text from which on it is taken away"
    )
    profile: str | None = parameter(
        None,
        str,
        optional=True,
        file=True,
        idle=({"heads": Given},),
        help="file with an ablation profile of captions; none: heads.safetensors of the model",
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the rows that predict, or none when no row has a picture."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"adhh cannot act: {reason}", "give heads=L16H29/L26H9, or profile=FILE")
        if not bool(layout.tokens.any()):
            return DecodingPlan()
        chosen = marked(vlm, self.chosen(vlm))
        return DecodingPlan(edits=(Deactivation(layers=layers_with(chosen), chosen=chosen, threshold=self.threshold),))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that heads are known for the model, and exist in it."""
        if self._listed(vlm) is None:
            if reason := why_no_profile(vlm, self.name, PROFILER, self.profile):
                return f"{reason}; it must be of captions: add --instances FILE --captions FILE"
            profile = profile_for(vlm, self.name, PROFILER, self.profile)
            if profile is not None and profile.card.parameters.get("target") != "captions":
                return (
                    "the ablation profile was measured without annotations, so it says which heads support the next "
                    "token and not which push hallucinated words; measure it with --instances FILE --captions FILE"
                )
        chosen = self.chosen(vlm)
        return beyond(vlm, chosen) or (None if chosen else "no head of the profile pushes hallucinated words")

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the profile's facts, when heads come from one."""
        return {} if self._listed(vlm) is not None else profile_facts(vlm, self.name, PROFILER, self.profile)

    def chosen(self, vlm: Checkpoint) -> tuple[tuple[int, int], ...]:
        """Returns (layer, head) of the heads to act in, strongest first; none when no heads of the model are known.

        Raises:
            DataError: The profile cannot be read.
            ProfileMismatchError: It was measured on another model.
        """
        listed = self._listed(vlm)
        if listed is not None:
            return listed.pairs[: self.count]
        profile = profile_for(vlm, self.name, PROFILER, self.profile)
        if profile is None:
            return ()
        every = profile.scores.numel()
        count = max(1, round(SHARE * every)) if self.count is None else min(self.count, every)
        return strongest(profile.scores, count)

    def _listed(self, vlm: Checkpoint) -> HeadList | None:
        """Returns the heads that were given, or that the authors publish for the model; None to take a profile's."""
        if self.heads is not None or self.profile is not None:
            return self.heads
        config = vlm.model.config
        text = config.get_text_config()
        return PUBLISHED.get((config.model_type, text.model_type, text.hidden_size, text.num_hidden_layers))


@dataclass(frozen=True, eq=False, kw_only=True)
class Deactivation(WeightEdit):
    """Removes the attention to the text behind the picture from heads that read it too much.

    Attributes:
        chosen: (L, H) bool, the heads.
        threshold: theta.
    """

    chosen: Tensor
    threshold: float
    rows: ClassVar[Rows] = "last"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"chosen"})

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights without that text, (B, H, R, K); rows sum to 1 or less."""
        if site.prefill:
            site.learn("chosen", self.chosen[site.layer].expand(len(weights), -1))  # (B, H)
        text = text_behind(site)[:, None, None, :]  # (B, 1, 1, K)
        read = (weights * text).sum(dim=-1, keepdim=True)  # (B, H, R, 1)
        off = (read >= self.threshold) & site.learned("chosen")[..., None, None]
        return torch.where(off & text, 0.0, weights)


def text_behind(site: Site) -> Tensor:
    """Marks the prompt's and the generated text behind the row's last picture, (B, K) bool; none without a picture.

    It also marks keys of a static cache that are not yet filled; no query attends to those.
    """
    key = torch.arange(site.image_keys.shape[1], device=site.image_keys.device)  # (K,)
    picture = torch.where(site.image_keys, key, -1).amax(dim=1, keepdim=True)  # (B, 1)
    return (site.text_keys | site.answer_keys) & (key > picture) & (picture >= 0)
