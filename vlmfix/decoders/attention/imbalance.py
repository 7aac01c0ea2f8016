"""Imbalanced attention: raises attention to the image tokens that the vision encoder itself finds important."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, ScoreEdit, Site
from vlmfix.decoders.attention.profiled import profile_facts, profile_for, why_no_profile
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError, UsageError, VlmfixError
from vlmfix.insight.significance import Significance, no_class_token, of_tower, of_vit, too_shallow
from vlmfix.insight.vit import load_vit
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

PROFILER = "image-mass"
"""Name of the profiler that measures how much a head looks at the picture."""
SAID = {
    "cls": "attention of the class token of the model's vision tower",
    "received": "attention that patches of the model's vision tower receive, in place of a class token's",
}
"""Words of a run card for the tower's maps."""


class Groups(NamedTuple):
    """Marks the image tokens of one picture that are raised; no token is in both groups.

    Attributes:
        local: (N,) bool.
        summary: (N,) bool.
    """

    local: Tensor
    summary: Tensor


def select(significance: Significance, *, local_share: float, spatial_share: float) -> Groups:
    """Chooses the tokens of one picture; of equal ones it takes the first.

    Args:
        significance: The picture's numbers, each (N,); a token with NaN is neither counted nor chosen.
        local_share: a in [0, 1].
        spatial_share: s in [0, 1].
    """
    known = ~significance.penultimate.isnan()
    summary = torch.zeros_like(known)
    summary[known] = outliers(significance.penultimate[known])
    count = int(known.sum())
    local = largest(significance.first, share_of(local_share, count))
    local |= largest(significance.spatial, share_of(spatial_share, count))
    return Groups(local=local & ~summary, summary=summary)


def outliers(values: Tensor) -> Tensor:
    """Marks the values more than 1.5 interquartile ranges above the third quartile, (N,) bool."""
    if not len(values):
        return torch.zeros(0, dtype=torch.bool)
    values = values.double()
    low, high = values.quantile(0.25), values.quantile(0.75)
    return values > high + 1.5 * (high - low)


def largest(values: Tensor, count: int) -> Tensor:
    """Marks the largest values, (N,) bool; NaN counts as the smallest."""
    order = values.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


def share_of(share: float, count: int) -> int:
    """Computes floor(share * count), with 0.7 of 10 being 7 whatever the last binary digit says."""
    return math.floor(share * count + 1e-9)


def relative_sensitivity(scores: Tensor) -> Tensor:
    """Divides each head's score by its layer's mean, (L, H); 1 in a layer where all are 0."""
    mean = scores.mean(dim=1, keepdim=True)  # (L, 1)
    return torch.where(mean > 0, scores / mean, 1.0)


ALIKE = {"sensitivity": 0.0}
"""Where all heads have the same gains."""


@dataclass(frozen=True, kw_only=True)
class Imbalance(Decoder):
    """Raises attention to two groups of image tokens that are chosen in the vision tower, one more than the other.

    Once for each picture of N tokens, with c1 and c2 the attention that the tower's class token gives each of them in
    the tower's first and penultimate layer, summed over heads:

    - *summary* tokens: those with ``c2 > Q3 + 1.5 (Q3 - Q1)``, by the quartiles of c2; there may be none;
    - *local* tokens: the ``floor(local_share * N)`` with the largest c1, and the ``floor(spatial_share * N)`` that the
      patches attend to most in the first layer, without the summary tokens.

    In every layer of ``layers``, in the row that predicts and for all heads, before the softmax:

        z_j <- z_j + alpha |z_j|  for local tokens j,     z_j <- z_j + beta |z_j|  for summary tokens j

    so a positive score becomes ``(1 + alpha) z`` and a negative one ``(1 - alpha) z``: both rise. With every token
    local and none of the summary this is PAI's edit. With ``sensitivity`` above 0 both gains of head h in layer l are
    multiplied by ``g = clip(1 + sensitivity (u - 1), least_gain, most_gain)``, u the head's mean attention to pictures
    over that of its layer's heads.

    Args:
        preset: ``paper`` (beta 0.4, spatial_share 0.05) or ``official-code`` (beta 0.3, spatial_share 0).
        alpha: Gain of local tokens in [0, 10]; above 1 negative scores become positive. The authors tried 0.1 to 0.9 on
            LLaVA-1.5-7B: up to 0.5 it does little, 0.9 destroys the answer.
        beta: Gain of summary tokens in [0, 10]; None takes the preset's.
        local_share: a in [0, 1]; the authors tried 0.1 to 0.3.
        spatial_share: s in [0, 1]; None takes the preset's.
        layers: Layers to act in; the authors' are all but the first two.
        significance: Where c1, c2 and the spatial numbers come from: ``cls``, the class token of the model's vision
            tower; ``received``, what its patches receive from all patches in place of c1 and c2 (``spatial_share``
            then ranks as c1 does); ``vit``, the class token of another ViT. None takes ``vit`` when one is given and
            ``cls`` otherwise. Towers without a class token (SigLIP, Qwen-VL) are refused under ``cls``.
        vit: A timm model with a class token, such as ``vit_base_patch16_224.dino``, or a folder that timm wrote. It is
            shown the whole picture, and a token takes the mean of its maps over the token's box.
        sensitivity: lambda in [0, 10], how much gains follow the heads; 0 gives all heads the same.
        least_gain: Lower end of g, in [0, 10].
        most_gain: Upper end of g, in [0, 10].
        profile: File with an ``image-mass`` profile of the model; None takes the one beside its weights. It is read
            when ``sensitivity`` is above 0.

    *Source*: Arif, Dip, Hussain, Zhang, Thomas, "PAINT", arXiv 2501.12206; code hasanar1f/PAINT at 2a9e8f8, built on
    PAI (LALBJ/PAI).

    *Differs*: the abstract of the first version promises gains by head and neither version's code has any: the formula
    here is a proposal, and off (its profile looks at the token that predicts the answer's first word alone). The
    code's spatial score is the sum of a softmax row, 1 for every token, and its share 0; here it is what a token
    receives, as described. The code serves one picture of 576 patches in one row, and no grouped queries; here a
    picture with several tiles is one ranking over all of its tokens, each tile with a class token of its own; where
    patches merge into one token their numbers are summed; tokens of padding count where the model has them.
    ``received`` and ``vit`` stand in for a class token and are not the authors'; in Qwen2.5-VL's windowed layers a
    patch receives from its own window alone. A row without a picture is left as it is.

    *Cost*: one pass per token, and one more pass of the vision tower (or of the ViT) for each distinct picture of a
    call. One row of scores per head is materialised, in prefill and in decoding. Beams and compiled decoding work.

    Example:
        >>> Imbalance(alpha=0.5, preset="official-code").parameters()["beta"]
        0.3
    """

    name: ClassVar[str] = "imbalance"
    source: ClassVar[Source] = Source(
        title="PAINT: Paying Attention to INformed Tokens",
        year=2025,
        arxiv="2501.12206",
        code="https://github.com/hasanar1f/PAINT",
    )
    acts_on: ClassVar[str] = "attention scores"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"beta": 0.4, "spatial_share": 0.05},
        "official-code": {"beta": 0.3, "spatial_share": 0.0},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="default of beta and spatial_share")
    alpha: float = parameter(0.7, float, low=0, high=10, search=(0.1, 2.0), help="gain of local tokens")
    beta: float = parameter(None, float, low=0, high=10, search=(0.1, 2.0), help="gain of summary tokens")
    local_share: float = parameter(0.25, float, low=0, high=1, search=(0.1, 0.5), help="a, share of local tokens")
    spatial_share: float = parameter(None, float, low=0, high=1, search=(0.0, 0.2), help="s, share of spatial tokens")
    layers: LayerSet = parameter("2:", LayerSet, help="layers to act in")
    significance: str | None = parameter(
        None,
        str,
        choices=("cls", "received", "vit"),
        optional=True,
        help="what chooses tokens; none: vit when one is given, else cls",
    )
    vit: str | None = parameter(None, str, optional=True, file=True, help="a timm ViT by name, or a folder with one")
    sensitivity: float = parameter(0.0, float, low=0, high=10, help="lambda, how much gains follow a profile of heads")
    least_gain: float = parameter(
        0.0, float, low=0, high=10, idle=(ALIKE,), help="g_min, least factor on a head's gains"
    )
    most_gain: float = parameter(
        2.0, float, low=0, high=10, idle=(ALIKE,), help="g_max, largest factor on a head's gains"
    )
    profile: str | None = parameter(
        None,
        str,
        optional=True,
        file=True,
        idle=(ALIKE,),
        help="file with an image-mass profile; none: the one beside the model's weights",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.significance == "vit") != (self.vit is not None) and self.significance is not None:
            raise UsageError(
                f"imbalance: significance={self.significance} with vit={self.vit}",
                "significance=vit needs vit=NAME or vit=FOLDER, and the others go without one",
            )
        if self.least_gain > self.most_gain:
            raise UsageError(
                f"imbalance: least_gain={self.least_gain:g} is above most_gain={self.most_gain:g}", "swap them"
            )

    @property
    def chosen_by(self) -> str:
        """Returns ``significance``, or the source that None stands for: ``cls``, ``received`` or ``vit``."""
        return self.significance or ("cls" if self.vit is None else "vit")

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the rows that predict."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(
                f"imbalance cannot act: {reason}", "give other layers, another significance or a profile"
            )
        heads = self.head_gains(vlm)
        gains = self.gains(vlm, batch, layout)
        return DecodingPlan(edits=(TokenGain(layers=self.layers, gains=gains, heads=heads),))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the model has maps to choose tokens by, and a profile where one is read."""
        count = vlm.layers
        if not self.layers.resolve(count):
            return f"the model's {count} layers hold none of layers {self.layers}"
        if self.vit is not None:
            try:
                load_vit(self.vit, vlm.device)
            except VlmfixError as error:
                return str(error)
        elif reason := too_shallow(vlm) or (no_class_token(vlm) if self.chosen_by == "cls" else None):
            return reason
        return why_no_profile(vlm, self.name, PROFILER, self.profile) if self.sensitivity else None

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the source of the maps, with the digest of a ViT's weights, and the profile that is read."""
        if self.vit is None:
            facts = {"significance": SAID[self.chosen_by]}
        else:
            facts = {
                "significance": f"attention of the class token of the ViT {self.vit}",
                "vit_digest": f"sha256:{load_vit(self.vit, vlm.device).digest()}",
            }
        return facts | (profile_facts(vlm, self.name, PROFILER, self.profile) if self.sensitivity else {})

    def gains(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> Tensor:
        """Computes the gains, (B, T) float32: alpha at local tokens, beta at summary tokens, 0 elsewhere."""
        gains = torch.zeros(layout.tokens.shape)
        if not bool(layout.tokens.any()):
            return gains.to(layout.tokens.device)
        found = self.significant(vlm, batch, layout)
        numbers = layout.image.cpu()
        for row in range(batch.rows):
            for image in range(int(numbers[row].max()) + 1):
                mine = numbers[row] == image  # (T,)
                own = Significance(*(values[row, mine] for values in found))
                groups = select(own, local_share=self.local_share, spatial_share=self.spatial_share)
                gains[row, mine] = self.alpha * groups.local + self.beta * groups.summary
        return gains.to(layout.tokens.device)

    def significant(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> Significance:
        """Computes the numbers that tokens are chosen by, each (B, T)."""
        if self.vit is not None:
            return of_vit(self.vit, batch, layout, vlm.device)
        return of_tower(vlm, batch, layout, rows="class" if self.chosen_by == "cls" else "patches")

    def head_gains(self, vlm: Checkpoint) -> Tensor | None:
        """Returns g of each head, (L, H) float32; None when all heads get the same gains."""
        if not self.sensitivity:
            return None
        profile = profile_for(vlm, self.name, PROFILER, self.profile)
        if profile is None:  # ``check`` has said so
            raise IncompatibleDecodersError("imbalance has no profile", "give sensitivity=0 or profile=FILE")
        relative = relative_sensitivity(profile.scores)
        return (1 + self.sensitivity * (relative - 1)).clamp(self.least_gain, self.most_gain).to(vlm.device)


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenGain(ScoreEdit):
    """Adds to each score a multiple of its absolute value.

    Attributes:
        gains: (samples, T) the multiple at each prompt token; 0 leaves a score as it is.
        heads: (L, H) factor on that multiple for each head, or None for 1.
    """

    gains: Tensor
    heads: Tensor | None = None
    rows: ClassVar[Rows] = "last"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"gains", "heads"})

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Returns the raised scores, (B, H, R, K)."""
        if site.prefill:
            site.learn_of_keys("gains", site.spread(self.gains))  # (B, T)
            heads = scores.new_ones(site.heads) if self.heads is None else self.heads[site.layer]
            site.learn("heads", heads.expand(len(scores), -1))  # (B, H)
        gain = site.learned("gains")[:, None, None, :] * site.learned("heads")[..., None, None]  # (B, H, 1, K)
        return scores + gain * scores.abs()
