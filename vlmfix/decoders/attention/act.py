"""ACT: takes attention away from sinks within the input, in heads that were found to do better without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import ColumnReading, LayerSet, PartEdit, Rows, Site
from vlmfix.decoders.attention.chosen import beyond, layers_with, marked
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.insight.sinks import first_token
from vlmfix.language.parameters import PRESETS_OWN, Given, Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

Heads = frozenset[tuple[int, int]]
"""Pairs of layer and query head."""

LISTS: dict[str, str] = {
    "classification": (
        "2:2,8,12,13,16,17,20,25 3:0,1,2,10,24,28 4:1,3,4,9,10,11,15,19,23,25,27,30 5:0,1,3,8,9,12,13,14,19,22 "
        "6:1,11,13,15,17,18,20,21,22,25,28,31 7:7,8,18,24,25 8:0,2,5,6,7,8,26 9:0,6,7,10,11,15,17,20,21,29 "
        "10:1,4,19,22,23,25,26,27,31 11:6,8,10,12,14,15,17,18,21,26,27,28 12:0,4,6,11,21,24,25,27 13:1,4,9,21,25,26,27 "
        "14:0,1,4,7,9,12,13,15,19,21,24 15:6,9,12,17,19,21,24,25,26 16:0,29 17:0,15,19,24,29,30 18:7,12,22,23 "
        "19:2,15,16,21,30 20:1,2,5,9,10,15,20,27,29 21:17,20,24,29 22:2,3,5,6,13,15,25 23:5,6,16 24:1,3,5,13,20 "
        "25:17,24 26:9,14,19,20 27:2,29 29:2,14,15,25 30:2"
    ),
    "multiple-choice": (
        "2:8,13,17,20 3:1 4:23,27,30 5:0,1,9,10,13,17,27 6:1,11,22,31 8:2,6 9:0,7,10,15,20 10:19,22,23,25,26 "
        "11:8,10,12,14,15,17,18,26 12:0,6,31 13:8,9,21,26 14:0,13,15 15:12,21,24 16:31 17:24,30 18:7,17 19:30 "
        "20:15,29 21:20 22:2,6 24:18,20 26:6,14,19 27:29 28:13 29:2,15 31:4,31"
    ),
}
"""Calibrated heads of Llama-2-7B-chat that the authors released, as layer:heads."""
LISTED = ("llama", 4096, 32, 32)
"""Model of these lists: its text model's type, hidden size, layers and key/value heads, which LLaVA-1.5-7B has."""
NAMED = re.compile(r"L(\d+)H(\d+)")


@dataclass(frozen=True, kw_only=True)
class ACT(Decoder):
    """Attention Calibration Technique: shrinks sinks other than the first token, in the heads that they hurt.

    In a chosen head, with attention A over the N tokens of the prompt, ``avg[j]`` is the mean of column j over the rows
    that can see it. The sinks S are the keys with ``avg[j]`` above a threshold, but for the first token. Then in every
    row of the prompt and while decoding ``A[i, j] * kept_fraction`` for j in S, and the freed mass goes to all keys
    outside S in proportion to what they have, the first token included. Rows keep their sums. S is chosen per head and
    per question, from the prompt, and stays while decoding.

    Args:
        preset: ``paper`` (threshold 5 / N; the first token is spared) or ``official-code`` (threshold 0.1; the first
            sink is spared, whether it is the first token or not; columns at the end count).
        kept_fraction: beta in [0, 1]; 1 is the plain model.
        sink_factor: alpha_s >= 0; the threshold is alpha_s / N. Read only when ``sink_threshold`` is none.
        sink_threshold: theta in [0, 1], a threshold for prompts of any length; none: ``sink_factor`` / N.
            The released code has 0.1, and 0.15 for free answers (MT-Bench).
        spared: The token that is never a sink: the ``first-token`` or the ``first-sink``.
        spared_tail: Columns at the prompt's end that are never sinks: few rows can see them, and the last one's mean
            is one number.
        heads: ``L2H8/L2H13`` and so on, ``all``, ``classification`` or ``multiple-choice`` (the authors' lists for
            Llama-2-7B-chat); None takes ``classification`` on a model with LLaMA-2-7B's shape. Other models have no
            published list, and the method says so: which heads are better off is found with labels, once, by
            ``calibration.search_heads``.
        layers: Layers to act in; listed heads outside are left alone. Of 32 the authors use 2 to 30.
        rows: Rows of the prompt that are edited and averaged over: ``prompt``, every one as the authors do, or
            ``text``, those behind a picture (this package's choice, for speed: prefill recomputes little then, and
            questions about one picture share it; a row without a picture is left alone).

    *Source*: Yu, Wang, Fu, Shi, Shaikh, Lin, "Unveiling and Harnessing Hidden Attention Sinks", ICML 2024, arXiv
    2406.15765; code GATECH-EIC/ACT at a267af7.

    *Differs*: the authors' models are text models; here image tokens are rows like any other, and can be sinks. In
    decoding the released code takes the one query for the first row and sets its attention to the first token to 1, so
    that the row sums to more than 1; here, in both presets, the sinks of the prompt shrink as in any other row. That
    code edits the first sample of a batch alone. ``spared_tail`` is 3 in preset ``paper``, this package's choice.

    *Cost*: one pass per token. Prefill runs SDPA three times and once backwards, to find the sinks and to shrink them,
    and materialises nothing; behind an edit of weights or scores in a chain it materialises all of attention, in blocks
    of rows that hold at most 2**25 weights. Questions about one picture read it anew. Decoding materialises one row per
    head. Beams and compiled decoding work.

    Example:
        >>> ACT(heads="L2H8/L3H1").kept_fraction
        0.4
    """

    name: ClassVar[str] = "act"
    source: ClassVar[Source] = Source(
        title="Attention Calibration Technique",
        year=2024,
        arxiv="2406.15765",
        code="https://github.com/GATECH-EIC/ACT",
    )
    acts_on: ClassVar[str] = "attention weights"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"spared": "first-token", "spared_tail": 3},
        "official-code": {"sink_threshold": 0.1, "spared": "first-sink", "spared_tail": 0},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="named set of parameters")
    kept_fraction: float = parameter(
        0.4, float, low=0, high=1, search=(0.0, 0.9), help="beta, share of its weight that a sink keeps"
    )
    sink_factor: float = parameter(
        5.0,
        float,
        low=0,
        high=1e6,
        search=(1.0, 20.0),
        log=True,
        idle=({"sink_threshold": Given},),
        help="alpha_s, the threshold times the prompt length",
    )
    sink_threshold: float | None = parameter(
        PRESETS_OWN,
        float,
        low=0,
        high=1,
        optional=True,
        help="theta, a fixed threshold; none: sink_factor / prompt length",
    )
    spared: str = parameter(None, str, choices=("first-token", "first-sink"), help="what is never a sink")
    spared_tail: int = parameter(None, int, low=0, high=10**6, help="columns at the prompt's end that are never sinks")
    heads: str | None = parameter(
        None, str, optional=True, help="L2H8/L2H13, all, or a published list; none: the one for the model"
    )
    layers: LayerSet = parameter("2:-1", LayerSet, help="layers to act in")
    rows: str = parameter(
        "prompt", str, choices=("prompt", "text"), help="rows of the prompt to act on; text: those behind a picture"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None and self.heads != "all" and self.heads not in LISTS:
            read_heads(self.heads)

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans a search for sinks and an edit, in the layers that have chosen heads."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"act cannot act: {reason}", "give heads=L2H8/L2H13, or heads=all")
        chosen = marked(vlm, self._chosen(vlm))
        layers = layers_with(chosen)
        reading, edit = (SinkSearch, Calibration) if self.rows == "prompt" else (TextSinkSearch, TextCalibration)
        search = reading(
            layers=layers,
            factor=self.sink_factor,
            threshold=self.sink_threshold,
            first_sink=self.spared == "first-sink",
            tail=self.spared_tail,
        )
        return DecodingPlan(edits=(search, edit(layers=layers, search=search, chosen=chosen, kept=self.kept_fraction)))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that heads are known for the model, and exist in the layers to act in."""
        if self.heads is None and not _is_listed(vlm):
            return (
                "no calibrated heads are published for this model; find them with labelled questions "
                "(vlmfix.decoders.attention.calibration.search_heads)"
            )
        if reason := beyond(vlm, sorted(self._named(vlm))):
            return reason
        if not self._chosen(vlm):
            return f"none of its heads are in layers {self.layers} of the model's {vlm.layers}"
        return None

    def _named(self, vlm: Checkpoint) -> Heads:
        if self.heads == "all":
            count, heads = vlm.layers, vlm.heads
            return frozenset((layer, head) for layer in range(count) for head in range(heads))
        name = self.heads or "classification"
        return published(name) if name in LISTS else read_heads(name)

    def _chosen(self, vlm: Checkpoint) -> Heads:
        layers = self.layers.resolve(vlm.layers)
        return frozenset((layer, head) for layer, head in self._named(vlm) if layer in layers)


def read_heads(text: str) -> Heads:
    """Reads heads written as ``L2H8/L2H13``.

    Raises:
        UsageError: It is not of that form.
    """
    found = [NAMED.fullmatch(part) for part in text.split("/")]
    pairs = frozenset((int(match[1]), int(match[2])) for match in found if match)
    if not all(found):
        known = " | ".join(("all", *LISTS))
        raise UsageError(f"act: heads={text!r} is not allowed", f"allowed: {known}, or heads such as L2H8/L2H13")
    return pairs


def write_heads(heads: Heads | list[tuple[int, int]]) -> str:
    """Writes heads as ``read_heads`` reads them, in order."""
    return "/".join(f"L{layer}H{head}" for layer, head in sorted(heads))


def published(name: str) -> Heads:
    """Returns one of the authors' lists."""
    rows = [row.split(":") for row in LISTS[name].split()]
    return frozenset((int(layer), int(head)) for layer, heads in rows for head in heads.split(","))


def _is_listed(vlm: Checkpoint) -> bool:
    config = vlm.model.config.get_text_config()
    return LISTED == (config.model_type, config.hidden_size, config.num_hidden_layers, config.num_key_value_heads)


@dataclass(frozen=True, eq=False, kw_only=True)
class SinkSearch(ColumnReading):
    """Averages the columns of one call's prompt, layer by layer.

    Attributes:
        factor: alpha_s.
        threshold: theta, or None for alpha_s / N.
        first_sink: Spare the first sink, not the first token.
        tail: Columns at the prompt's end that are never sinks.
        sums: Layer number -> (B, H, T), attention to each key summed over the rows that can see it.
        numbers: Layer number -> (B, T), how many rows these are.
    """

    rows: ClassVar[Rows] = "prompt"
    blockwise: ClassVar[bool] = True

    factor: float
    threshold: float | None
    first_sink: bool
    tail: int
    sums: dict[int, Tensor] = field(default_factory=dict)
    numbers: dict[int, Tensor] = field(default_factory=dict)

    def counts(self, site: Site) -> Tensor:
        """Returns the rows of the prompt's tokens, (B, R) bool."""
        return site.acts & (site.queries >= first_token(site)[:, None]) & (site.queries < site.prompt)

    def add(self, site: Site, sums: Tensor, numbers: Tensor) -> None:
        """Adds the rows of a block."""
        sums, numbers = sums[..., : site.prompt], numbers[:, : site.prompt]  # (B, H, T), (B, T)
        if site.block > 0:
            sums, numbers = self.sums[site.layer] + sums, self.numbers[site.layer] + numbers
        self.sums[site.layer], self.numbers[site.layer] = sums, numbers

    def sinks(self, site: Site) -> Tensor:
        """Returns the sinks of the prompt in a layer that was read, (B, H, T) bool."""
        first = first_token(site)[:, None]  # (B, 1)
        mean = self.sums[site.layer] / self.numbers[site.layer].clamp(min=1)[:, None]  # (B, H, T)
        threshold = self.factor / (site.prompt - first) if self.threshold is None else self.threshold
        sink = mean > torch.as_tensor(threshold, device=mean.device).view(-1, 1, 1)
        key = torch.arange(site.prompt, device=mean.device)
        sink = sink & (key < site.prompt - self.tail)
        return sink & (sink.cumsum(dim=-1) > 1) if self.first_sink else sink & (key != first)[:, None]


@dataclass(frozen=True, eq=False, kw_only=True)
class TextSinkSearch(SinkSearch):
    """Averages the columns of a prompt over the text rows behind a picture."""

    rows: ClassVar[Rows] = "text"


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration(PartEdit):
    """Calibrates attention in one call; it remembers the sinks of that call's prompt, (B, H, T) bool.

    Attributes:
        search: What stands before it among the edits and finds the sinks.
        chosen: (L, H) bool, heads to calibrate.
        kept: beta.
    """

    rows: ClassVar[Rows] = "prompt"
    blockwise: ClassVar[bool] = True
    of_prompt: ClassVar[frozenset[str]] = frozenset({"search", "chosen"})

    search: SinkSearch
    chosen: Tensor
    kept: float

    def keys(self, site: Site) -> Tensor:
        """Returns the sinks of the chosen heads, (B, H, K) bool; generated tokens are never sinks."""
        if site.prefill and site.block == 0:
            site.learn_of_keys("sinks", self.search.sinks(site) & self.chosen[site.layer, :, None])
        return site.learned("sinks")

    def factors(self, own: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factor that shrinks sinks, and the one that hands their loss to the other keys in proportion.

        The row's sum stays; a row whose keys are all sinks is unchanged.
        """
        some, lost = rest > 0, 1 - self.kept
        return 1 - lost * some.to(rest.dtype), 1 + lost * own / torch.where(some, rest, 1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class TextCalibration(Calibration):
    """Calibrates attention in the text rows behind a picture alone."""

    rows: ClassVar[Rows] = "text"
