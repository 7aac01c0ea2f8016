"""VISTA: turns what layers add to the residual stream towards what the picture has put there; hears late layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlmfix.attention.edit import LayerSet, ResidualEdit, Site
from vlmfix.attention.probe import leaving
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.branches import Contrast, without_picture
from vlmfix.decoding.exits import Exit
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.running import running
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

SHARE = (26 / 32, 31 / 32)
"""Layers that have been passed at the first and at the last of the authors' exits, blocks 25 to 30 of 32."""


@dataclass(frozen=True, kw_only=True)
class VISTA(Decoder):
    """Visual steering vectors: turns what each layer adds to the stream towards what the picture has put into it.

    With ``d`` of a layer the difference, at the prompt's last token, between the stream that leaves it with the picture
    and without, and n(.) unit length, what the layer's MLP adds becomes ``|x| * n(n(x) + strength * (1 + max(0, cos(x,
    -d))) * n(d))``, for every token of prompt and answer, so that lengths stay as they are. Then the logits become
    ``(1 - augmentation) * l + augmentation * m``, with m the mean of what the output head, without the last norm, makes
    of the stream behind late layers.

    Args:
        preset: ``captions`` (strength 0.17) or ``questions`` (0.01), the authors' for LLaVA-1.5.
        strength: lambda >= 0.
        augmentation: gamma in [0, 1]; 0 leaves the logits to the last layer.
        layers: Layers in which it is turned.
        exits: Late layers, counted as layers passed. None takes the authors' 26 to 31 of 32 (blocks 25 to 30), as
            shares of the depth.
        place: ``mlp``, what a layer's MLP adds to the stream, as released, or ``layer``, the whole stream behind it.
        direction: ``difference``, or ``official-code``: with the component that the released code adds to it, 1 in the
            first coordinate of the first layer.

    *Source*: Li et al., "The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual
    Information Steering", ICML 2025, arXiv 2502.03628; code LzVv123456/VISTA.

    *Differs*: to the difference the released code adds the first principal component, which of its single sample is an
    arbitrary unit vector of a zero matrix: on a CPU 1 in the first coordinate of the first layer, elsewhere perhaps
    not. That says nothing of the picture, so the default leaves it out. What is turned is not rounded to float16, and
    the code takes one sample at a time. Rows without a picture are left alone.
    With ``place=layer`` every layer turns what earlier ones have turned: the authors' strengths are too large there.

    *Cost*: the prompt twice more, once without the picture; one pass per token, and the output head once more for each
    exit. Questions about one picture do not share its pass.

    Example:
        >>> VISTA(preset="questions").spec()
        'vista:preset=questions,strength=0.01,augmentation=0.3,layers=all,exits=none,place=mlp'
    """

    name: ClassVar[str] = "vista"
    source: ClassVar[Source] = Source(
        title="Visual Information Steering", year=2025, arxiv="2502.03628", code="https://github.com/LzVv123456/VISTA"
    )
    acts_on: ClassVar[str] = "residual stream, logits of late layers"
    compiles: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "captions": {"strength": 0.17},
        "questions": {"strength": 0.01},
    }

    preset: str = parameter("captions", str, choices=("captions", "questions"), help="whose strength")
    strength: float = parameter(
        None, float, low=0, high=10, search=(0.005, 0.5), log=True, help="lambda, how far it is turned"
    )
    augmentation: float = parameter(
        0.3, float, low=0, high=1, search=(0.0, 0.6), help="gamma, weight of late layers' logits"
    )
    layers: LayerSet = parameter("all", LayerSet, help="layers to act in")
    exits: LayerSet | None = parameter(
        None,
        LayerSet,
        optional=True,
        idle=({"augmentation": 0.0},),
        help="late layers, in layers passed; none: 26 to 31 of 32, by depth",
    )
    place: str = parameter("mlp", str, choices=("mlp", "layer"), help="what an MLP adds to the stream, or the stream")
    direction: str = parameter(
        "difference", str, choices=("difference", "official-code"), later=True, help="what it is turned towards"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the turn, and the rule for the logits, for rows that have a picture."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"vista cannot act: {reason}", "give exits that the model has")
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        directions = last_states(vlm, batch) - last_states(vlm, without_picture(vlm, batch).batch)  # (B, L, D)
        if self.direction == "official-code":
            directions[:, 0, 0] += 1
        edit = Turned(
            layers=self.layers,
            strength=self.strength,
            directions=directions * pictured[:, None, None],
            place="layer" if self.place == "layer" else "mlp",
        )
        if self.augmentation == 0:
            return DecodingPlan(edits=(edit,))
        rule = Augmented(
            branches=(),
            rows=pictured,
            exits=tuple(Exit(number, normed=False) for number in self.places(vlm)),
            weight=self.augmentation,
        )
        return DecodingPlan(edits=(edit,), contrasts=(rule,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that there is an exit, where there has to be one."""
        if self.augmentation == 0 or self.places(vlm):
            return None
        return f"the model's {vlm.layers} layers have no exit there"

    def places(self, vlm: Checkpoint) -> list[int]:
        """Returns how many layers have been passed at each exit."""
        if self.exits is not None:
            return sorted(self.exits.resolve(vlm.layers))
        first, last = (round(share * vlm.layers) for share in SHARE)
        return list(range(max(first, 1), min(last, vlm.layers - 1) + 1))


@torch.no_grad()
def last_states(vlm: Checkpoint, batch: Batch) -> Tensor:
    """Reads the residual stream of each prompt's last token behind each layer, (B, L, hidden size) float32."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int, stream: Tensor) -> None:
        seen[layer] = stream[:, -1].float()  # prompts are padded on the left

    with (
        running(vlm, batch, vlm.layout(batch), DecodingPlan(), limit=1, name="a look at the stream") as call,
        leaving(vlm, keep),
    ):
        call.prompt()
    return torch.stack([stream.to(vlm.device) for _, stream in sorted(seen.items())], dim=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Turned(ResidualEdit):
    """Turns the stream, or what is added to it, towards a direction, and keeps its length.

    Attributes:
        strength: lambda.
        directions: (B, L, hidden size) float32 of the samples; zero for those without a picture.
        place: See ``ResidualEdit``.
    """

    strength: float
    directions: Tensor
    place: Literal["layer", "mlp"]
    of_prompt: ClassVar[frozenset[str]] = frozenset({"directions"})

    def stream(self, site: Site, stream: Tensor) -> Tensor:
        """Returns what is turned, (B, Q, hidden size)."""
        if site.prefill:
            site.learn("direction", site.spread(self.directions[:, site.layer]))
        direction, exact = site.learned("direction")[:, None], stream.float()  # (B, 1, D), (B, Q, D)
        away = cosine_similarity(exact, -direction, dim=-1)[..., None].clamp(min=0)
        turned = normalize(exact, dim=-1) + self.strength * (1 + away) * normalize(direction, dim=-1)
        new = exact.norm(dim=-1, keepdim=True) * normalize(turned, dim=-1)
        return torch.where(direction.any(dim=-1, keepdim=True), new, exact)


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmented(Contrast):
    """Mixes the mean of the exits' logits into the scores.

    Attributes:
        weight: gamma.
    """

    weight: float
    steps_alike: ClassVar[bool] = False

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + weight * (mean of the exits - clean)``."""
        return scores + self.weight * (others.mean(dim=0) - clean)
