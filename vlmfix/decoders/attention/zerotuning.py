"""ZeroTuning: scales every head's attention to the first token, and with it how much the others say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, ProductBias, Rows, Site
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError
from vlmfix.insight.sinks import first_token, first_token_mass
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

LEAST_MASS = 0.01
"""Attention to the first token that some head must have, so that scaling it can change something."""


@dataclass(frozen=True, kw_only=True)
class ZeroTuning(Decoder):
    """Multiplies the weight of the first token by ``gain`` and renormalises: one lever on all other tokens.

    With attention ``a`` of a row and ``D = (gain - 1) * a_0 + 1``, the first token gets ``gain * a_0 / D`` and every
    other ``a_i / D``. A gain above 1 flattens what the other tokens add, a gain below 1 sharpens it; their mutual
    ratios stay, so no token is chosen. The same as ``log(gain)`` added to the score of key 0, and done so, in every row
    of the prompt and while decoding.

    Args:
        preset: Default of ``gain``. The authors name none, they choose it for each task; their demonstration has two:
            ``question-answering`` (0.3, on BoolQ) and ``classification`` (3.5, on SST-2).
        gain: gamma in [0, 1000]; 1 is the plain model, 0 hides the first token. Of the authors' tasks classification
            mostly gains above 1 and question answering below. ``calibration.choose_gain`` chooses one on a validation
            set, or without labels by the entropy of the answer's first token.
        heads: Query heads to scale, joined by ``/``, the same in every layer; None takes all. The authors scale the
            larger of the two kinds, heads that help at gain 2 (use a gain above 1) or that hurt (below 1):
            ``calibration.classify_heads`` tells them apart.
        layers: Layers to act in. The first two thirds are said to matter more than the last.
        rows: Rows of the prompt to act on: ``prompt``, every one as the authors do, or ``text``, those behind a picture
            (this package's choice, for speed: prefill recomputes little then, and questions about one picture share
            it; a row without a picture is left alone).

    *Source*: Han, Yu, Tang, Rao, Du, Ungar, "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language
    Models Without Training", arXiv 2505.11739; code FeijiangHan/ZeroTuning at 51df35b.

    *Differs*: the released code scales column 0, which is padding in a padded batch; here each row's first real token
    is meant. A gain of 0 divides by zero in its first row; here that row is left alone. Its renormalisation in half
    precision, its other token ranges and its overwritten BOS token are not reproduced. The authors studied text
    models only; here image tokens are keys and rows like any other. The lever is as strong as the sink: differences
    between other weights change by the factor ``1 / D``. Where no head gives the first token 0.01 of its attention the
    method refuses, unless heads are named (a probe of 8 short prompts, once per model).

    *Cost*: one pass per token and no state. An additive bias, so it stays on SDPA: in prefill it is one
    more dimension of queries and keys. Questions about one picture read it anew. Beams and compiled decoding work.

    Example:
        >>> ZeroTuning(gain=0.5, heads=(0, 3)).spec()
        'zerotuning:preset=question-answering,gain=0.5,heads=0/3,layers=all,rows=prompt'
    """

    name: ClassVar[str] = "zerotuning"
    source: ClassVar[Source] = Source(
        title="ZeroTuning",
        year=2025,
        arxiv="2505.11739",
        code="https://github.com/FeijiangHan/ZeroTuning",
    )
    acts_on: ClassVar[str] = "attention, additive bias"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "question-answering": {"gain": 0.3},
        "classification": {"gain": 3.5},
    }

    preset: str = parameter(
        "question-answering", str, choices=("question-answering", "classification"), help="default of the gain"
    )
    gain: float = parameter(
        None, float, low=0, high=1000, search=(0.125, 8.0), log=True, help="gamma, factor on the first token's weight"
    )
    heads: tuple[int, ...] | None = parameter(
        None, tuple, optional=True, help="query heads to scale in every layer; none: all"
    )
    layers: LayerSet = parameter("all", LayerSet, help="layers to act in")
    rows: str = parameter(
        "prompt", str, choices=("prompt", "text"), help="rows of the prompt to act on; text: those behind a picture"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the first token's score."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"zerotuning cannot act: {reason}", "give other heads or layers")
        chosen = None
        if self.heads is not None:
            chosen = torch.zeros(vlm.heads, dtype=torch.bool, device=vlm.device)
            chosen[list(self.heads)] = True
        edit = FirstTokenBias if self.rows == "prompt" else TextBias
        return DecodingPlan(edits=(edit(layers=self.layers, gain=self.gain, chosen=chosen),))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the model's heads look at the first token; named heads need only exist."""
        if self.heads is not None:
            count = vlm.heads
            wrong = [head for head in self.heads if not 0 <= head < count]
            return f"heads {wrong} are outside the model's {count}" if wrong else None
        try:
            mass = first_token_mass(vlm)  # (L, H)
        except UnsupportedAttentionError as error:
            return error.message
        layers = sorted(self.layers.resolve(len(mass)))
        if not layers:
            return f"the model's {len(mass)} layers hold none of layers {self.layers}"
        largest = float(mass[layers].max())
        if largest < LEAST_MASS:
            return f"the first token is no sink: no head gives it more than {largest:.2%} of its attention"
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class FirstTokenBias(ProductBias):
    """Adds log(gain) to the score of each prompt's first token, in every row but its own.

    Attributes:
        gain: gamma.
        chosen: (H,) bool, heads to scale; None for all.
    """

    rows: ClassVar[Rows] = "prompt"
    blockwise: ClassVar[bool] = True

    gain: float
    chosen: Tensor | None

    def factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Returns which rows are changed, (B, 1 or H, R), and log(gain) at the first token, (B, K)."""
        key = torch.arange(site.allowed.shape[-1], device=site.queries.device)
        first = first_token(site)[:, None]  # (B, 1)
        here = (site.queries > first)[:, None]  # (B, 1, R)
        if self.chosen is not None:
            here = here & self.chosen[None, :, None]  # (B, H, R)
        return here.float(), torch.where(key == first, math.log(self.gain) if self.gain > 0 else -math.inf, 0.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class TextBias(FirstTokenBias):
    """Adds log(gain) in the text rows behind a picture, and in the decoding rows of prompts that have one."""

    rows: ClassVar[Rows] = "text"

    def factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Returns the factors, with no row of a prompt that has no picture."""
        rows, keys = super().factors(site)
        return rows * site.image_keys.any(dim=1)[:, None, None], keys
