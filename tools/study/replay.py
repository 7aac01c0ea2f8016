"""Replays captions under a decoder: which tokens get its attention, and how probable it finds what was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from tools.training.questions import DESCRIBE
from vlmfix.attention.edit import ProductBias, Rows, Site, WeightEdit
from vlmfix.decoders import Decoder
from vlmfix.decoding.running import running
from vlmfix.generation import VLM
from vlmfix.insight.sinks import find_sinks, sink_strength
from vlmfix.models.layout import Batch

GROUPS = ("first token", "image sinks", "other image tokens", "question", "answer")
"""Every key is in one of them; the first token of the prompt, whatever it is, is in the first alone."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen(WeightEdit):
    """Notes how much attention each group gets in the row that predicts; changes nothing.

    Attributes:
        groups: (4, T) bool, the prompt's tokens by group; what comes later is the answer's.
        found: For every layer of every pass, in order, (5,) mean over the heads.
    """

    groups: Tensor
    found: list[Tensor] = field(default_factory=list)
    rows: ClassVar[Rows] = "last"

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Notes the first row, which is the clean one, and returns the weights."""
        row = weights[0, :, -1].mean(0)  # (K,)
        prompt = self.groups.shape[1]
        of_prompt = self.groups.to(row.dtype) @ row[:prompt]  # (4,)
        self.found.append(torch.cat([of_prompt, row[prompt:].sum()[None]]).cpu())
        return weights


@dataclass(frozen=True, eq=False, kw_only=True)
class Without(ProductBias):
    """Hides some of the prompt's tokens, one row's or each row's own, from every row.

    Attributes:
        hidden: (B, T) bool, those tokens; the first of a prompt must not be among them.
    """

    hidden: Tensor
    rows: ClassVar[Rows] = "prompt"
    blockwise: ClassVar[bool] = True
    of_prompt: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Returns 1 for each row, and minus infinity for the hidden keys."""
        if site.prefill:
            site.learn_of_keys("hidden", self.hidden)
        hidden = site.learned("hidden")  # (B, K)
        rows = site.allowed.new_ones(len(hidden), 1, site.queries.shape[1], dtype=torch.float32)
        return rows, torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -torch.inf)


@dataclass(frozen=True)
class Replay:
    """One caption, replayed.

    Attributes:
        attention: (tokens, layers, 5) attention by group.
        probabilities: (tokens, V) of each next token.
        sinks: Number of image tokens that are sinks, the prompt's first token left out.
    """

    attention: Tensor
    probabilities: Tensor
    sinks: int


def sinks_of(vlm: VLM, batch: Batch) -> Tensor:
    """Finds the image tokens of one prompt that are massive in the model's sink dimensions.

    Returns:
        (T,) bool; the strength is the mean over the layers from two fifths to seven tenths of all, where it is highest,
        and the threshold that of ``find_sinks``.
    """
    report = find_sinks(vlm)
    image = vlm.layout(batch).tokens[0]  # (T,)
    if not report.dims:
        return torch.zeros_like(image)
    with torch.inference_mode():
        states = vlm.model(**batch, output_hidden_states=True).hidden_states
    count = len(states) - 1
    middle = torch.stack(states[2 * count // 5 : 7 * count // 10 + 1])[:, 0]  # (layers, T, width)
    return image & (sink_strength(middle, report.dims).mean(0) > report.threshold)


def groups_of(vlm: VLM, batch: Batch) -> Tensor:
    """Returns (4, T) bool, the tokens of one prompt by group."""
    image, sinks = vlm.layout(batch).tokens[0], sinks_of(vlm, batch)
    first = torch.zeros_like(image)
    first[0] = True
    return torch.stack([first, sinks & ~first, image & ~sinks & ~first, ~image & ~first])


def replayed(
    vlm: VLM, pictures: Sequence[Image.Image], said: Sequence[int], decoder: Decoder, *, hidden: Tensor | None = None
) -> Replay:
    """Replays a caption of one picture token by token.

    Args:
        vlm: The model.
        pictures: The picture, and what the decoder shows beside it.
        said: The caption's n tokens.
        decoder: What is at work; its pictures are refined already.
        hidden: (1, T) bool, tokens of the prompt that nobody sees.
    """
    batch = vlm.encode([DESCRIBE[0]], [list(pictures)])
    layout = vlm.layout(batch)
    seen = Seen(groups=groups_of(vlm, batch))
    extra = () if hidden is None else (Without(hidden=hidden),)
    plan = decoder.plan(vlm, batch, layout)
    plan = replace(plan, edits=(*plan.edits, *extra, seen), compiles=False)
    rows = []
    with torch.inference_mode(), running(vlm, batch, layout, plan, limit=len(said), name=decoder.name) as call:
        rows.append(call.prompt()[0])
        for token in said[:-1]:
            rows.append(call.token(torch.tensor([token], device=vlm.device))[0])
    layers = len(seen.found) // len(said)
    return Replay(
        attention=torch.stack(seen.found).view(len(said), layers, len(GROUPS)),
        probabilities=torch.stack(rows).float().softmax(-1).cpu(),
        sinks=int(seen.groups[1].sum()),
    )


def averaged(replays: Sequence[Replay]) -> Mapping[str, float]:
    """Returns the attention of all captions' tokens by group, mean over layers and tokens."""
    means = torch.stack([one.attention.mean(dim=(0, 1)) for one in replays]).mean(0)
    return dict(zip(GROUPS, means.tolist(), strict=True))
