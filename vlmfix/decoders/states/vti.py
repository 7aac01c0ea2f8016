"""VTI: turns what layers of the text decoder and of the vision tower add to their streams in measured directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfix.attention.edit import LayerSet, ResidualEdit, Site
from vlmfix.attention.tower import TowerEdit, tower_layers
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.states.directed import directions_facts, directions_for, why_no_directions
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import DataError, IncompatibleDecodersError, VlmfixError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

STEP = 0.1
"""Factor of the authors' code on both strengths."""


@dataclass(frozen=True, kw_only=True)
class VTI(Decoder):
    """Visual and textual intervention: turns what layers add to their stream in directions that were measured before.

    In each layer, what the MLP adds to the stream becomes ``|x| * n(n(x) + 0.1 * strength * n(d))``, with n(.) unit
    length, so that lengths stay as they are: in the text decoder for every token of prompt and answer, with ``d`` from
    captions with a planted object to true ones, and in the vision tower for every patch, with ``d`` from the picture to
    what masks leave of it. ``vlmfix profile --directions vti`` measures both.

    Args:
        preset: ``mean`` or ``official-code``; they differ in ``direction``.
        direction: ``mean``, the mean of the differences over pictures, or ``pca``, to which their first principal
            component is added, as released.
        text: lambda_t, in the text decoder; 0 leaves it as it is.
        image: lambda_v, in the vision tower; below 0 it is turned the other way.
        layers: Layers of the text decoder in which it is turned.
        profile: File with directions (``vlmfix profile --directions vti``); None takes the one in the model's folder.

    *Source*: Liu et al., "Reducing Hallucinations in Vision-Language Models via Latent Space Steering", ICLR 2025,
    arXiv 2410.15778; code shengliu66/VTI.

    *Differs*: the released code adds the first principal component to the mean. It is a unit vector whatever the
    differences' size, so it says nothing where they are large and nearly all where they are small, and a component has
    no sign of its own (the code takes that of the picture that it says most of, and so does ``pca`` here); the default
    leaves it out. In the tower the code takes components over blocks of layers and places that a reshape has mixed, and
    here they are of each place over all layers. There, directions belong to places in the picture; where a tower has no
    fixed places (Qwen-VL) each layer has one. The text's last layer has its direction from the stream before the last
    norm, in the code from behind it. Nothing is rounded to float16. Contrast rows, and rows without a picture, are left
    alone in the text decoder; the tower turns the pictures of contrast rows as well.

    *Cost*: one pass per token. Questions about one picture do not share its pass.

    Example:
        >>> VTI(preset="official-code").spec()
        'vti:preset=official-code,direction=pca,text=0.9,image=0.9,layers=all,profile=none'
    """

    name: ClassVar[str] = "vti"
    source: ClassVar[Source] = Source(
        title="Latent Space Steering", year=2025, arxiv="2410.15778", code="https://github.com/shengliu66/VTI"
    )
    acts_on: ClassVar[str] = "residual stream, stream of the vision tower"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "mean": {"direction": "mean"},
        "official-code": {"direction": "pca"},
    }

    preset: str = parameter("mean", str, choices=("mean", "official-code"), help="whose direction")
    direction: str = parameter(None, str, choices=("mean", "pca"), help="mean difference, or with the first component")
    text: float = parameter(0.9, float, low=0, high=100, search=(0.1, 10.0), log=True, help="lambda_t, text decoder")
    image: float = parameter(0.9, float, low=-100, high=100, help="lambda_v, vision tower; 0 leaves it alone")
    layers: LayerSet = parameter("all", LayerSet, idle=({"text": 0.0},), help="layers of the text decoder to act in")
    profile: str | None = parameter(
        None, str, optional=True, file=True, help="file with directions; none: directions.safetensors of the model"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans an edit of the stream, and one of the vision tower."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"vti cannot act: {reason}", "give profile=FILE")
        if not bool(layout.tokens.any()):
            return DecodingPlan()
        edits: tuple[ResidualEdit, ...] = ()
        tower: tuple[TowerEdit, ...] = ()
        if self.text:
            edits = (Steered(layers=self.layers, strength=STEP * self.text, directions=self.of_text(vlm)),)
        if self.image:
            tower = (TowerSteered(STEP * self.image, self.of_vision(vlm)),)
        return DecodingPlan(edits=edits, tower=tower)

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that directions are known for the model, of its sizes."""
        if not self.text and not self.image:
            return None
        if reason := why_no_directions(vlm, self.name, self.profile):
            return reason
        try:
            if self.text:
                self.of_text(vlm)
            if self.image:
                self.of_vision(vlm)
        except VlmfixError as error:
            return error.message
        return None

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the file of directions, and their digest."""
        return directions_facts(vlm, self.name, self.profile) if self.text or self.image else {}

    def of_text(self, vlm: Checkpoint) -> Tensor:
        """Reads the directions of the text decoder, (L, hidden size) float32."""
        width = vlm.model.config.get_text_config().hidden_size
        return self._found(vlm, "text", vlm.layers, width)

    def of_vision(self, vlm: Checkpoint) -> Tensor:
        """Reads the directions of the vision tower, (layers of the tower, places or 1, its hidden size) float32."""
        return self._found(vlm, "vision", len(tower_layers(vlm)), None, None)

    def _found(self, vlm: Checkpoint, part: str, *shape: int | None) -> Tensor:
        held = directions_for(vlm, self.name, self.profile)
        found = held.tensor(f"{part}_mean", *shape)
        if self.direction == "pca":
            found = found + held.tensor(f"{part}_component", *found.shape)
        return found.to(vlm.device)


@dataclass(frozen=True, eq=False, kw_only=True)
class Steered(ResidualEdit):
    """Turns what MLPs add to the stream in one direction per layer, and keeps its length.

    Attributes:
        strength: Length of what is added to a unit vector.
        directions: (L, hidden size) float32.
    """

    strength: float
    directions: Tensor
    place: Literal["layer", "mlp"] = "mlp"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"directions"})

    def stream(self, site: Site, stream: Tensor) -> Tensor:
        """Returns what is turned, (B, Q, hidden size)."""
        if site.prefill:
            pictured = site.image_keys.any(dim=1, keepdim=True)  # (B, 1)
            site.learn("direction", normalize(self.directions[site.layer], dim=-1) * pictured)
        direction = site.learned("direction")[:, None]  # (B, 1, D)
        return torch.where(direction.any(dim=-1, keepdim=True), turned(stream, self.strength * direction), stream)


class TowerSteered(TowerEdit):
    """Turns what the tower's MLPs add to the stream, and keeps its length.

    Args:
        strength: Length of what is added to a unit vector.
        directions: (layers, places or 1, hidden size) float32.
    """

    def __init__(self, strength: float, directions: Tensor) -> None:
        self._strength, self._directions = strength, normalize(directions, dim=-1)

    def stream(self, layer: int, stream: Tensor) -> Tensor:
        """Returns what is turned, of the shape of ``stream``.

        Raises:
            DataError: A view has another number of places than those that directions were measured on.
        """
        direction = self._directions[layer].to(stream.device)
        if len(direction) not in (1, stream.shape[-2]):
            raise DataError(
                f"the vision tower sees {stream.shape[-2]} places, and the directions are of {len(direction)}",
                "measure directions with the processor as it is set now",
            )
        return turned(stream, self._strength * direction)


def turned(stream: Tensor, shift: Tensor) -> Tensor:
    """Adds a shift to the unit vectors of a stream, (..., D), and gives the sums the stream's lengths."""
    exact = stream.float()
    new: Tensor = exact.norm(dim=-1, keepdim=True) * normalize(normalize(exact, dim=-1) + shift, dim=-1)
    return new
