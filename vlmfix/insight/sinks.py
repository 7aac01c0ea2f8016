"""Finds sinks: dimensions in which a model's first token is massive, and image tokens that are massive in them too.

Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv
2503.03321; the contrastive probe is this package's own (it needs no table and no data).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from vlmfix.attention.edit import ColumnReading, Rows, Site, WeightEdit
from vlmfix.attention.session import bare, edited
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.upstream.wrappers import weights_of

TABLE: dict[tuple[str, int, int, int], tuple[int, ...]] = {
    ("llama", 4096, 32, 32): (1415, 2533),
    ("llama", 5120, 40, 40): (2100, 4743),
    ("qwen2_vl_text", 3584, 28, 4): (458, 2570),
    ("qwen2_5_vl_text", 3584, 28, 4): (458, 2570),
}
"""Sink dimensions by the text model's type, hidden size, layers and key/value heads: LLaMA-2-7B and 13B with their
Vicuna and LLaVA children, Qwen2-VL-7B and Qwen2.5-VL-7B."""

RESTING = 0.3
"""Attention to the first token from which a head rests on it."""
RATIO = 20.0
"""How far a sink's dimension stands out of the token's other dimensions: the paper's threshold, at any width."""
ORDINARY = 1.0
"""Strength of ordinary tokens in the sink dimensions of the tabulated models: that of any dimension of theirs."""

SURPLUS = 5.0
"""How many times its even share of attention an image token gets that is a sink in a prompt's map: alpha_s of ACT."""
FEWEST = 0.1
"""Share of the rows that must see it."""

QUESTIONS = (
    "Describe this image.",
    "What is in the picture?",
    "Is there a dog in the image?",
    "How many people are there?",
    "What colour is the sky?",
    "Please describe this image in detail.",
    "What is on the table?",
    "Name one thing that you see.",
)
"""Prompts of the probe, each asked once with a picture and once without."""


@dataclass(frozen=True)
class SinkReport:
    """Describes a model's sinks.

    Attributes:
        dims: Sink dimensions, strongest first; empty when no dimension stands out.
        largest: Largest ``|x_d| / rms(x)`` of the first token in the middle layers (median over prompts and layers).
        bound: sqrt(hidden size), the largest value that ``|x_d| / rms(x)`` can take.
        ordinary: Median ``sink_strength`` of the tokens behind the first, in the middle layers; 0 without dims.
        threshold: tau: what was given, or what ``ratio_threshold`` makes of ``ordinary``.
        visual_share: Share of image tokens above the threshold, mean over the middle layers, in [0, 1].
    """

    dims: tuple[int, ...]
    largest: float
    bound: float
    ordinary: float
    threshold: float
    visual_share: float


def sink_strength(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Computes phi, which says how massive a token is in the sink dimensions.

    Args:
        hidden: (..., hidden size) residual stream; no norm's gain is applied.
        dims: Sink dimensions, at least one.

    Returns:
        (...) float32, ``max over dims of |x_d / sqrt(mean(x^2) + 1e-6)|``, in [0, sqrt(hidden size)].
    """
    x = hidden.float()
    scale = (x.square().mean(dim=-1) + 1e-6).rsqrt()
    return x[..., list(dims)].abs().amax(dim=-1) * scale


def ratio_threshold(hidden_size: int, ordinary: float = ORDINARY) -> float:
    """Computes the ``sink_strength`` from which a token is a sink, for any width and any ordinary strength (our rule).

    ``phi = |x_d| / rms(x)`` cannot exceed sqrt(hidden size), and near it grows hardly at all, because x_d is most of
    the rms itself. ``rho = |x_d| / rms(the other dimensions) = phi / sqrt(1 - phi^2 / hidden size)`` has no bound and
    does not depend on the width. A sink's rho is 20 more than an ordinary token's. With an ordinary strength of 1 that
    is a phi of 19.8 at 3584 dimensions, 20.0 at 4096 and 20.2 at 5120, where the paper takes 20. SmolLM2 has 576
    dimensions, a bound of 24 and one dimension of 12 in every token: there it is 19.6.

    Args:
        hidden_size: Dimensions of the residual stream.
        ordinary: Strength of ordinary tokens in the sink dimensions, in [0, sqrt(hidden size)).
    """
    usual = ordinary / math.sqrt(1 - ordinary**2 / hidden_size)
    ratio = RATIO + usual
    return ratio / math.sqrt(1 + ratio**2 / hidden_size)


def threshold_of(vlm: Checkpoint) -> float:
    """Returns ``ratio_threshold`` of a model; the ordinary strength of one that is not tabulated is probed."""
    if tabulated_sinks(vlm):
        return ratio_threshold(vlm.model.config.get_text_config().hidden_size)
    return find_sinks(vlm).threshold


def least_massive(hidden_size: int) -> float:
    """Computes the least ``|x_d| / rms(x)`` of the first token that is massive: 0.15 of the bound, and at least 3."""
    return max(0.15 * math.sqrt(hidden_size), 3.0)


def first_token(site: Site) -> Tensor:
    """Returns the key of each row's first token, past its padding, (B,) int64."""
    return (site.text_keys | site.image_keys).int().argmax(dim=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSinks(ColumnReading):
    """Finds the image tokens that draw attention before any question is read, and so say nothing of what it asks about.

    With N tokens up to the prompt's last image token: ``mean over heads, and over the rows of these that see token j,
    of a[j] > 5 / N``. Tokens that less than a tenth of them see are never sinks, since a few rows, their own among
    them, say little. Source: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", ICML 2024, arXiv 2406.15765,
    whose rule is for each head, and takes the rows behind the picture too: there a patch that is asked about would be
    one.

    Attributes:
        sums: Layer number -> (B, T), attention to each token summed over rows, mean over heads.
        numbers: Layer number -> (B, T), how many rows see it.
        image: (B, T) bool, the image tokens, once a layer was read.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    numbers: dict[int, Tensor] = field(default_factory=dict)
    image: list[Tensor] = field(default_factory=list)
    rows: ClassVar[Rows] = "prompt"
    blockwise: ClassVar[bool] = True

    def counts(self, site: Site) -> Tensor:
        """Returns the rows up to the last image token, (B, R) bool."""
        image = site.image_keys[:, : site.prompt].int()
        last = site.prompt - 1 - image.flip(-1).argmax(dim=1, keepdim=True)  # (B, 1)
        before = (site.queries <= last) & image.any(dim=1, keepdim=True)
        return site.acts & (site.queries >= first_token(site)[:, None]) & before

    def add(self, site: Site, sums: Tensor, numbers: Tensor) -> None:
        """Adds the rows of a block."""
        sums, numbers = sums[..., : site.prompt].float().mean(dim=1), numbers[:, : site.prompt]
        if site.block > 0:
            sums, numbers = self.sums[site.layer] + sums, self.numbers[site.layer] + numbers
        self.sums[site.layer], self.numbers[site.layer] = sums, numbers
        self.image[:] = [site.image_keys[:, : site.prompt]]

    def found(self) -> Tensor:
        """Returns the sinks, (B, layers that were read, T) bool, in the order of the layers."""
        device, layers = self.image[0].device, sorted(self.sums)
        sums, numbers = (
            torch.stack([part[layer].to(device) for layer in layers], dim=1) for part in (self.sums, self.numbers)
        )
        count = numbers.amax(dim=-1, keepdim=True)  # the first token is seen by all
        drawn = sums / numbers.clamp(min=1) > SURPLUS / count
        return drawn & (numbers >= FEWEST * count) & self.image[0][:, None]


@dataclass(frozen=True, eq=False, kw_only=True)
class _FirstMass(WeightEdit):
    """Records the attention of the edited rows to the first token, and changes nothing.

    Attributes:
        found: Layer number -> for each pass, (H,) mean over the query rows of its one batch row.
    """

    found: dict[int, list[Tensor]] = field(default_factory=dict)

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Records the mass, and returns the same weights."""
        mass = weights[0, :, site.acts[0], int(first_token(site)[0])]  # (H, R)
        self.found.setdefault(site.layer, []).append(mass.mean(dim=1))
        return weights


_MASSES: WeakKeyDictionary[nn.Module, dict[Hashable, Tensor]] = WeakKeyDictionary()


def first_token_mass(vlm: Checkpoint) -> Tensor:
    """Measures each head's attention to the first token by a probe of 8 short prompts, once per model and weights.

    Returns:
        (L, H) float32 on the CPU, in [0, 1]: mean over the prompt's text rows behind the picture.

    Raises:
        UnsupportedAttentionError: The model's attention is not plain softmax attention.
    """
    found = _MASSES.setdefault(vlm.family.decoder(vlm.model), {})
    weights = weights_of(vlm.model)
    if weights not in found:
        probe = _FirstMass()
        for number, question in enumerate(QUESTIONS):
            batch = vlm.encode([question], [[random_picture(number)]])
            with torch.no_grad(), bare(vlm), edited(vlm, vlm.layout(batch), (probe,)):
                vlm.model(**batch)
        layers = [torch.stack(probe.found[layer]).mean(dim=0) for layer in sorted(probe.found)]
        found[weights] = torch.stack(layers).float().cpu()
    return found[weights]


def sink_rate(vlm: Checkpoint) -> float:
    """Measures the share of heads that rest on the first token, by the probe of ``first_token_mass``.

    The measure is that of Gu et al., "When Attention Sink Emerges in Language Models", ICLR 2025, arXiv 2410.10781: a
    head rests there when it gives the token more than ``RESTING`` of its attention, on average.

    Returns:
        In [0, 1].

    Raises:
        UnsupportedAttentionError: The model's attention is not plain softmax attention.
    """
    return float((first_token_mass(vlm) > RESTING).float().mean())


def tabulated_sinks(vlm: Checkpoint) -> tuple[int, ...]:
    """Returns the sink dimensions in the literature for a model of this type and size; empty when it gives none."""
    config = vlm.model.config.get_text_config()
    key = (config.model_type, config.hidden_size, config.num_hidden_layers, config.num_key_value_heads)
    return TABLE.get(key, ())


_REPORTS: WeakKeyDictionary[nn.Module, dict[Hashable, SinkReport]] = WeakKeyDictionary()


def find_sinks(vlm: Checkpoint, *, threshold: float | None = None) -> SinkReport:
    """Finds a model's sink dimensions by a probe of 16 short prompts, once per model and weights.

    The probe compares the first token with all others in layers L/4 to 3L/4: dimensions in which it is massive (see
    ``least_massive``) and the others are not, at most four.

    Args:
        vlm: The model.
        threshold: tau, for the share of image tokens that count as visual sinks; None for ``ratio_threshold``.
    """
    reports = _REPORTS.setdefault(vlm.family.decoder(vlm.model), {})
    key = (threshold, weights_of(vlm.model))
    if key not in reports:
        reports[key] = _probe(vlm, threshold)
    return reports[key]


def _probe(vlm: Checkpoint, threshold: float | None) -> SinkReport:
    width = vlm.model.config.get_text_config().hidden_size
    first, others, image = [], [], []
    for batch in _prompts(vlm):
        hidden = _middle_layers(vlm, batch)  # (layers, T, hidden size), normalised
        shown = vlm.layout(batch).tokens[0]
        first.append(hidden[:, 0].abs())
        others.append(hidden[:, 1:].abs().flatten(0, 1))
        image.append(hidden[:, shown])
    hit = torch.cat(first).median(dim=0).values  # (hidden size,)
    rest = torch.cat(others)  # (tokens, hidden size)
    contrast = hit - rest.median(dim=0).values
    # An ordinary dimension of a narrow model reaches 0.15 of the bound by chance, but not three deviations.
    chosen = (hit > least_massive(width)) & (contrast > 0.5 * contrast.max())
    order = contrast.masked_fill(~chosen, float("-inf")).topk(min(4, len(hit))).indices
    dims = tuple(int(d) for d in order.tolist() if bool(chosen[d]))
    patches = torch.cat([part.flatten(0, 1) for part in image])
    ordinary = float(rest[:, list(dims)].amax(dim=1).median()) if dims else 0.0
    tau = ratio_threshold(width, ordinary) if threshold is None else threshold
    share = float((patches[:, list(dims)].abs().amax(dim=1) > tau).float().mean()) if dims else 0.0
    return SinkReport(
        dims=dims,
        largest=float(hit.max()),
        bound=math.sqrt(width),
        ordinary=ordinary,
        threshold=tau,
        visual_share=share,
    )


def _prompts(vlm: Checkpoint) -> Iterator[Batch]:
    for number, question in enumerate(QUESTIONS):
        yield vlm.encode([question], [[random_picture(number)]])
        yield vlm.encode([question], [[]])


def random_picture(seed: int) -> Image.Image:
    """Draws a smooth random picture of coloured blobs, so that image tokens differ as they do in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(336, 336), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy(), mode="RGB")


@torch.no_grad()
def _middle_layers(vlm: Checkpoint, batch: Batch) -> Tensor:
    layers = vlm.family.layers(vlm.model)
    middle = range(len(layers) // 4, max(3 * len(layers) // 4, len(layers) // 4 + 1))
    with bare(vlm), _entering([layers[number] for number in middle]) as states:
        vlm.model(**batch)
    stack = torch.stack([state[0].float() for state in states])  # (layers, T, hidden size)
    return stack * (stack.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


@contextmanager
def _entering(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the residual stream that enters each layer."""
    states: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
