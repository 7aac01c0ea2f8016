"""Nullu: takes out of what layers add to the residual stream the directions in which hallucinated captions move it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlmfix.attention.edit import LayerSet, ResidualEdit, Site
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.states.directed import directions_facts, directions_for, why_no_directions
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import DataError, IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, kw_only=True)
class Nullu(Decoder):
    """Null-space projection: takes the directions of hallucinated captions out of what late layers add to the stream.

    With ``v_1 .. v_rank`` a layer's first directions, orthogonal and of unit length, what its MLP adds becomes ``x -
    sum_i (x . v_i) v_i``, for every token of prompt and answer. ``vlmfix profile --directions nullu`` measures them:
    the right singular vectors of the differences that planted objects make in the layer's mean state. Since it is the
    same for every question, ``vlmfix export`` writes it into the MLPs' last weights.

    Args:
        preset: ``llava`` (rank 4), the authors' command for LLaVA-1.5, or ``official-code`` (rank 8), their script's
            default.
        rank: k, directions taken out of each layer; at most as many as were measured.
        layers: Layers to act in. None takes the authors' 16 to 31 of 32, the later half.
        profile: File with directions (``vlmfix profile --directions nullu``); None takes the one in the model's folder.

    *Source*: Yang et al., "Nullu: Mitigating Object Hallucinations in Large Vision-Language Models via HalluSpace
    Projection", CVPR 2025, arXiv 2412.13817; code Ziwei-Zheng/Nullu.

    *Differs*: contrast rows, and rows without a picture, are left alone, which folded weights cannot do. The release
    measures on 5,000 pairs of captions that a language model made (LURE's); here one object of a true caption is
    exchanged for one that is not in the picture.

    *Cost*: one pass per token, and nothing once it is folded. Questions about one picture do not share its pass.

    Example:
        >>> Nullu(preset="official-code").spec()
        'nullu:preset=official-code,rank=8,layers=none,profile=none'
    """

    name: ClassVar[str] = "nullu"
    source: ClassVar[Source] = Source(
        title="HalluSpace Projection", year=2025, arxiv="2412.13817", code="https://github.com/Ziwei-Zheng/Nullu"
    )
    acts_on: ClassVar[str] = "residual stream, or weights of MLPs"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {"llava": {"rank": 4}, "official-code": {"rank": 8}}

    preset: str = parameter("llava", str, choices=("llava", "official-code"), help="whose rank")
    rank: int = parameter(None, int, low=0, high=1000, search=(1, 8), help="k, directions taken out of each layer")
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="layers to act in; none: 16 to 31 of 32, by depth"
    )
    profile: str | None = parameter(
        None, str, optional=True, file=True, help="file with directions; none: directions.safetensors of the model"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the stream."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"nullu cannot act: {reason}", "give profile=FILE, or another rank")
        if not self.rank or not bool(layout.tokens.any()):
            return DecodingPlan()
        return DecodingPlan(edits=(Erasing(layers=self._layers(vlm), vectors=self.vectors(vlm)),))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that as many directions are known for the model."""
        if not self.rank:
            return None
        if reason := why_no_directions(vlm, self.name, self.profile):
            return reason
        try:
            held = self._held(vlm).shape[1]
        except DataError as error:
            return error.message
        return f"{held} directions of each layer were measured, and not {self.rank}" if held < self.rank else None

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the file of directions, and their digest."""
        return directions_facts(vlm, self.name, self.profile) if self.rank else {}

    def folded(self, vlm: Checkpoint) -> dict[int, Tensor]:
        """Returns no factor of head outputs; see ``removed``."""
        return {}

    def removed(self, vlm: Checkpoint) -> dict[int, tuple[Tensor, ...]]:
        """Returns the directions that each layer's MLP loses."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"nullu cannot act: {reason}", "give profile=FILE, or another rank")
        if not self.rank:
            return {}
        vectors = self.vectors(vlm)
        return {layer: (vectors[layer],) for layer in sorted(self._layers(vlm).resolve(vlm.layers))}

    def vectors(self, vlm: Checkpoint) -> Tensor:
        """Reads the directions, (L, rank, hidden size) float32."""
        return self._held(vlm)[:, : self.rank].to(vlm.device)

    def _held(self, vlm: Checkpoint) -> Tensor:
        width = vlm.model.config.get_text_config().hidden_size
        return directions_for(vlm, self.name, self.profile).tensor("vectors", vlm.layers, None, width)

    def _layers(self, vlm: Checkpoint) -> LayerSet:
        return self.layers or LayerSet(f"{vlm.layers // 2}:")


@dataclass(frozen=True, eq=False, kw_only=True)
class Erasing(ResidualEdit):
    """Takes directions out of what MLPs add to the stream, in rows that have a picture.

    Attributes:
        vectors: (L, k, hidden size) float32, of unit length and orthogonal within a layer.
    """

    vectors: Tensor
    place: Literal["layer", "mlp"] = "mlp"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"vectors"})

    def stream(self, site: Site, stream: Tensor) -> Tensor:
        """Returns what is left, (B, Q, hidden size)."""
        if site.prefill:
            pictured = site.image_keys.any(dim=1)[:, None, None]  # (B, 1, 1)
            site.learn("vectors", self.vectors[site.layer] * pictured)
        vectors, exact = site.learned("vectors"), stream.float()  # (B, k, D), (B, Q, D)
        return exact - (exact @ vectors.mT) @ vectors
