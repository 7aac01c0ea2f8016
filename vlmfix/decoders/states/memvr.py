"""MemVR: shows the picture's tokens again to the MLP behind the first layer in which the model is unsure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmfix.attention.edit import LayerSet, ResidualEdit, Site
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream.readout import read_out

SHARE = (5 / 32, 16 / 32)
"""Between which layers the authors ask, as shares of the depth; neither is asked."""
BEST = 10
"""Tokens whose entropy is taken; its largest value is the logarithm of their number."""


@dataclass(frozen=True, kw_only=True)
class MemVR(Decoder):
    """Memory-space Visual Retracing: shows the picture again to the layer behind the first that is unsure.

    Behind each of ``layers`` the newest token's residual stream goes through the last norm and the output head. The
    entropy of the ten most probable tokens' shares, divided by ln 10, says how unsure the model is there. In the first
    layer in which it is above ``threshold``, the MLP of the next layer, with input ``x`` and output ``f``, gives
    ``(1 - ratio) * f + ratio * c * (x V^T) V`` instead: ``V`` are the picture's tokens as they enter the model, and
    ``c = mean |f| / mean |(x V^T) V|`` gives both the same size. That happens once in a pass at most, and in the
    prompt's pass to all of its tokens.

    Args:
        preset: ``readme`` (ratio 0.12) or ``captions`` (0.31, as in the released script for CHAIR).
        ratio: r in [0, 1], share of what the picture's tokens say.
        threshold: gamma in [0, 1], entropy from which on the model is unsure; 1 never.
        layers: Layers behind which it is asked, by number from 0. None takes those between the authors' 5 and 16 of 32,
            as shares of the model's depth.

    *Source*: Zou et al., "Look Twice Before You Answer: Memory-Space Visual Retracing for Hallucination Mitigation in
    Multimodal Large Language Models", ICML 2025, arXiv 2410.03577; code 1zhou-Wang/MemVR.

    *Differs*: the released code asks once for the whole batch and takes the last picture alone; here each row is asked
    for itself, with the tokens of all its pictures. The code's scaling of V to the MLP's weights is left out, since
    ``c`` undoes it.

    *Cost*: one pass per token, and the output head once more for each of the layers; questions about one picture do not
    share the pass over their prompts' beginning. It is refused beside `sgrs`, for which a prompt's last token
    passes once more, alone.

    Example:
        >>> MemVR(layers="2:6").spec()
        'memvr:preset=readme,ratio=0.12,threshold=0.75,layers=2:6'
    """

    name: ClassVar[str] = "memvr"
    source: ClassVar[Source] = Source(
        title="Memory-space Visual Retracing",
        year=2025,
        arxiv="2410.03577",
        code="https://github.com/1zhou-Wang/MemVR",
    )
    acts_on: ClassVar[str] = "residual stream"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {"readme": {"ratio": 0.12}, "captions": {"ratio": 0.31}}

    preset: str = parameter("readme", str, choices=("readme", "captions"), help="whose ratio")
    ratio: float = parameter(None, float, low=0, high=1, search=(0.02, 0.6), help="r, share of what the picture says")
    threshold: float = parameter(
        0.75, float, low=0, high=1, search=(0.4, 0.95), help="gamma, entropy of an unsure layer"
    )
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="layers behind which it is asked; none: between 5 and 16 of 32, by depth"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the edit, for rows that have a picture."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"memvr cannot act: {reason}", "give layers that the model has")
        if self.ratio == 0 or not bool(layout.tokens.any()):
            return DecodingPlan()
        acting = [number + 1 for number in self.places(vlm)]
        edit = Retraced(
            layers=LayerSet("/".join(str(number) for number in (0, *acting))),
            first=acting[0],
            ratio=self.ratio,
            threshold=self.threshold,
            model=vlm.model,
            decoder=vlm.family.decoder(vlm.model),
        )
        return DecodingPlan(edits=(edit,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that there is a layer to ask, and one behind it."""
        return None if self.places(vlm) else f"the model's {vlm.layers} layers have none there with another behind it"

    def places(self, vlm: Checkpoint) -> list[int]:
        """Returns the layers behind which it is asked."""
        if self.layers is not None:
            wanted: set[int] | range = set(self.layers.resolve(vlm.layers))
        else:
            first, last = (share * vlm.layers for share in SHARE)
            wanted = range(math.floor(first) + 1, math.ceil(last))
        return sorted(number for number in wanted if number + 1 < vlm.layers)


@dataclass(frozen=True, eq=False, kw_only=True)
class Retraced(ResidualEdit):
    """Mixes what the picture's tokens say into the MLP's output of the first layer that an unsure stream enters.

    In layer 0 it learns these tokens and changes nothing.

    Attributes:
        first: The first layer that may be changed.
        ratio: r.
        threshold: gamma.
        model: The model, for its output head.
        decoder: Its text decoder.
    """

    first: int
    ratio: float
    threshold: float
    model: PreTrainedModel
    decoder: nn.Module
    place: Literal["layer", "mlp"] = "mlp"
    needs_hidden: ClassVar[bool] = True
    together: ClassVar[bool] = True  # one size of all of the prompt

    def stream(self, site: Site, stream: Tensor) -> Tensor:
        """Returns the mixed output, (B, Q, hidden size)."""
        if site.hidden is None or site.entered is None:
            raise RuntimeError("the stream that enters the layer was not kept")
        if site.layer == 0:
            if site.prefill:
                image = site.image_keys[:, : site.tokens, None]
                site.learn_of_keys("shown", (site.hidden[:, : site.tokens] * image).float().mT.contiguous())
            return stream
        if site.prefill:  # one tensor each for all layers
            of_first = self.memory[self.first]
            site.learn_of_keys("shown", self.memory[0].of_keys["shown"])
        # the prompt's tokens act together, and those behind it each for itself
        start = site.tokens - 1 if site.prefill else 0
        unsure = self._unsure(site.hidden[:, start:])  # (B, 1 + A)
        if site.prefill and site.layer == self.first:
            site.memory.of_steps["done"] = torch.zeros_like(unsure)
        elif site.prefill:
            site.memory.of_steps["done"] = of_first.of_steps["done"]
        done = site.memory.of_steps["done"]
        if site.layer == self.first:
            done.zero_()
        acts = unsure & ~done
        done.logical_or_(unsure)

        shown, exact = site.learned("shown"), stream.float()  # (B, D, K), zero but for the picture's tokens
        said = site.entered.float() @ shown @ shown.mT  # (B, Q, D)
        sizes = [_sizes(part.abs().mean(dim=-1), site, start) for part in (exact, said)]  # (B, 1 + A) each
        scale = sizes[0] / sizes[1].where(sizes[1] > 0, 1.0)
        acts = acts & (sizes[1] > 0)
        group = (torch.arange(stream.shape[1], device=stream.device) - start).clamp(min=0)
        mixed = (1 - self.ratio) * exact + self.ratio * scale[:, group, None] * said
        return torch.where(acts[:, group, None], mixed, exact)

    def _unsure(self, states: Tensor) -> Tensor:
        """Tells behind which tokens the model would be unsure, (B, A) bool, by their (B, A, hidden size) streams."""
        best = read_out(self.model, self.decoder, states, normed=True).topk(BEST, dim=-1).values
        logs = best.log_softmax(dim=-1)
        return -(logs.exp() * logs).sum(dim=-1) / math.log(BEST) > self.threshold


def _sizes(values: Tensor, site: Site, start: int) -> Tensor:
    """Averages (B, Q) values over the real tokens of the prompt, up to ``start``, and leaves those behind it apart."""
    if not site.prefill:
        return values
    real = site.allowed[:, 0, -1, : start + 1].expand(len(values), -1)
    prompt = values[:, : start + 1].where(real, 0.0).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
    return torch.cat([prompt, values[:, start + 1 :]], dim=1)
