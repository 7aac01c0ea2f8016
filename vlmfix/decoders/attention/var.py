"""VAR: moves attention from sinks to the image tokens that show something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Site, WeightEdit
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.insight.sinks import find_sinks, least_massive, sink_strength, tabulated_sinks, threshold_of
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


def redistribute(weights: Tensor, image: Tensor, sink: Tensor, *, moved: float, ratio: float, mass: float) -> Tensor:
    """Moves a share of the sinks' attention to the other image keys, in the rows that look at image content.

    Args:
        weights: (B, H, R, K) attention, rows sum to 1.
        image: (B, K) bool, image keys.
        sink: (B, K) bool, sink keys, image or text.
        moved: m, share of every sink's weight that is moved.
        ratio: rho, smallest non-sink share of the image mass.
        mass: Smallest image mass.

    Returns:
        (B, H, R, K) with the same row sums; rows that do not qualify are unchanged, and so is a sample whose picture
        holds no sink.
    """
    target = (image & ~sink)[:, None, None, :]  # (B, 1, 1, K)
    surplus = sink[:, None, None, :]
    seen = (weights * image[:, None, None, :]).sum(dim=-1)  # (B, H, R)
    kept = (weights * target).sum(dim=-1)
    freed = moved * (weights * surplus).sum(dim=-1)
    visual = (image & sink).any(dim=-1)[:, None, None]
    selected = visual & (seen >= mass) & (kept > 0) & (kept >= ratio * seen)
    gain = freed / kept.clamp(min=1e-12)
    new = torch.where(surplus, (1 - moved) * weights, weights) + gain[..., None] * weights * target
    return torch.where(selected[..., None], new, weights)


@dataclass(frozen=True, kw_only=True)
class VAR(Decoder):
    """Visual Attention Redistribution: moves the surplus attention on sinks to the rest of the picture.

    A prompt token is a sink in layer l when ``phi(x) = max over sink dims of |x_d| / rms(x)`` of the residual stream
    that enters the layer exceeds ``sink_threshold``. In heads that look at real image content (image mass V >=
    ``min_visual_mass`` and non-sink share of it >= ``min_nonsink_ratio``), every sink key, text sinks such as BOS
    included, keeps ``1 - moved_fraction`` of its weight, and the freed mass goes to the non-sink image keys in
    proportion to what they have. Each row keeps its sum. Heads are chosen anew for every layer, query and step.

    Args:
        preset: ``paper`` (moved 0.6; the last layer is left alone) or ``official-code`` (moved 0.4; the released
            code means to skip the last layer and does not).
        moved_fraction: m in [0, 1], the paper's p; the released code's p is ``1 - m``.
        min_nonsink_ratio: rho in [0, 1.01]; the released code's is ``1 - rho``. The paper uses 0.5 against
            hallucination, 0.8 for general and 0.9 for vision-centric tasks. Above 1 selects no head.
        min_visual_mass: Image mass that a head needs, in [0, 1.01].
        sink_threshold: tau; None is that of the model: the sink dimension is 20 times the rms of the others, beyond
            what it is in ordinary tokens. That is 20 at 4096 dimensions and 12.7 at 256 (not in the paper: phi
            cannot exceed sqrt(hidden size), so 20 is out of reach below 400 dimensions).
        sink_dims: Sink dimensions, joined by ``/``; None takes the table, or probes the model.
        layers: Layers to act in. The first two are never edited: massive activations have not formed there.

    *Source*: Kang, Kim, Kim, Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR
    2025, arXiv 2503.03321; code seilk/VisAttnSink at 98e62d6.

    *Differs*: the released code keeps the first picture's sinks for all later ones, drops the BOS token, serves one
    row and edits the picture's own rows from the second sample on; none of that is reproduced, in either preset.
    Selection and redistribution are in float32. Several pictures are one set of image keys; newline tokens are not. A
    row without a picture is decoded plainly.

    *Cost*: one pass per token. Prefill materialises the text rows after the picture, decoding one row per head;
    sinks are found once, in prefill. Beams and compiled decoding work. The probe of an untabulated model is 16 short
    prompts, once.

    Example:
        >>> VAR(preset="official-code").moved_fraction
        0.4
    """

    name: ClassVar[str] = "var"
    source: ClassVar[Source] = Source(
        title="Visual Attention Redistribution",
        year=2025,
        arxiv="2503.03321",
        code="https://github.com/seilk/VisAttnSink",
    )
    acts_on: ClassVar[str] = "attention weights"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"moved_fraction": 0.6, "min_nonsink_ratio": 0.5, "layers": "2:-1"},
        "official-code": {"moved_fraction": 0.4, "min_nonsink_ratio": 0.5, "layers": "2:"},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="named set of parameters")
    moved_fraction: float = parameter(
        None, float, low=0, high=1, search=(0.1, 1.0), help="m, share of sink attention that is moved"
    )
    min_nonsink_ratio: float = parameter(
        None, float, low=0, high=1.01, search=(0.3, 0.95), help="rho, non-sink share of image attention"
    )
    min_visual_mass: float = parameter(
        0.2, float, low=0, high=1.01, search=(0.05, 0.5), help="image attention that a head needs"
    )
    sink_threshold: float | None = parameter(
        20.0, float, low=0, high=1e4, optional=True, help="tau; none: by width and ordinary tokens"
    )
    sink_dims: tuple[int, ...] | None = parameter(
        None, tuple, optional=True, help="sink dimensions; none: table or probe"
    )
    layers: LayerSet = parameter(None, LayerSet, help="layers to act in, never the first two")

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the text rows, or none when no row has a picture."""
        reason = self.check(vlm)
        if reason is not None:
            raise IncompatibleDecodersError(f"var cannot act: {reason}", "give sink_dims and sink_threshold to insist")
        if not bool(layout.tokens.any()):
            return DecodingPlan()
        edit = Redistribution(
            layers=_without_first_two(self.layers, vlm.layers),
            dims=self._dims(vlm),
            threshold=self._threshold(vlm),
            moved=self.moved_fraction,
            ratio=self.min_nonsink_ratio,
            mass=self.min_visual_mass,
        )
        return DecodingPlan(edits=(edit,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the model has visual sinks, unless sink dimensions are given or tabulated."""
        width = vlm.model.config.get_text_config().hidden_size
        if self.sink_dims is not None:
            wrong = [d for d in self.sink_dims if not 0 <= d < width]
            return f"sink_dims {wrong} are outside the model's {width} dimensions" if wrong else None
        if tabulated_sinks(vlm):
            return None
        report = find_sinks(vlm, threshold=self.sink_threshold)
        if not report.dims:
            return (
                f"the model has no sink dimensions (its first token reaches |x|/rms {report.largest:.1f} of a possible "
                f"{report.bound:.0f}; massive begins at {least_massive(width):.1f}, and other tokens must not share it)"
            )
        if report.visual_share == 0:
            return (
                f"the model has no visual sinks: no image token exceeds {report.threshold:.3g} in dimensions "
                f"{'/'.join(map(str, report.dims))}"
            )
        if report.visual_share > 0.2:
            return (
                f"{report.visual_share:.0%} of image tokens exceed {report.threshold:.3g} in dimensions "
                f"{'/'.join(map(str, report.dims))}, so these are no sink dimensions"
            )
        return None

    def _dims(self, vlm: Checkpoint) -> tuple[int, ...]:
        return self.sink_dims or tabulated_sinks(vlm) or find_sinks(vlm, threshold=self.sink_threshold).dims

    def _threshold(self, vlm: Checkpoint) -> float:
        return threshold_of(vlm) if self.sink_threshold is None else self.sink_threshold

    @classmethod
    def from_official(cls, *, p: float, rho: float) -> VAR:
        """Makes the decoder for the released code's ``p`` (share kept) and ``rho`` (largest sink share)."""
        if not 0 <= p <= 1 or not 0 <= rho <= 1:
            raise UsageError(f"p={p}, rho={rho} are not allowed", "both are shares in [0, 1]")
        return cls(preset="official-code", moved_fraction=round(1 - p, 12), min_nonsink_ratio=round(1 - rho, 12))


def _without_first_two(layers: LayerSet, count: int) -> LayerSet:
    chosen = sorted(layer for layer in layers.resolve(count) if layer >= 2)
    if not chosen:
        raise IncompatibleDecodersError(
            f"var acts in layers {layers} without the first two: none of the model's {count}", "give other layers"
        )
    return LayerSet("/".join(str(layer) for layer in chosen))


@dataclass(frozen=True, eq=False, kw_only=True)
class Redistribution(WeightEdit):
    """Redistributes attention in one call; it learns the sinks of that call's prompt, (B, T) bool.

    Attributes:
        dims: Sink dimensions.
        threshold: tau.
        moved: m.
        ratio: rho.
        mass: Smallest image mass.
    """

    dims: tuple[int, ...]
    threshold: float
    moved: float
    ratio: float
    mass: float
    needs_hidden: ClassVar[bool] = True

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights, (B, H, R, K), redistributed in the heads that look at image content."""
        if site.prefill:
            if site.hidden is None:
                raise RuntimeError("the residual stream was not recorded")
            site.learn_of_keys("sinks", sink_strength(site.hidden[:, : site.prompt], self.dims) > self.threshold)
        sink = site.learned("sinks")  # (B, K); generated tokens are never sinks
        return redistribute(weights, site.image_keys, sink, moved=self.moved, ratio=self.ratio, mass=self.mass)
