"""PTI: turns, once, what the KV cache keeps of picture and prompt's end in directions of objects that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlmfix.attention.edit import Column, PromptCacheEdit, Site
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.states.directed import directions_facts, directions_for, why_no_directions
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import DataError, IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, kw_only=True)
class PTI(Decoder):
    """Prefill-time intervention: turns what the KV cache keeps of the prompt, once, in directions of objects.

    In each layer and key/value head, a column ``c`` of the cache becomes ``|c| * n(n(c) + strength * (1 + max(0,
    cos(c, -s))) * n(s))``, with n(.) unit length: columns of the picture's tokens with ``s`` from backgrounds to
    objects, the prompt's last column with ``s`` from a caption without its objects to their list. Nothing is done for
    generated tokens, which see what is kept. ``vlmfix profile --directions pti`` measures the directions.

    Args:
        preset: ``full``, ``text``, which leaves the picture's columns alone and kept recall best in the authors'
            ablation, or ``official-code``, which is ``full`` with ``direction=pca``.
        columns: Columns to turn: ``both``, ``image`` or ``text``.
        direction: ``mean``, the mean of the differences over pictures, or ``pca``, to which their first principal
            component is added, as released.
        keys: lambda_K of keys.
        values: lambda_V of values.
        first: Whether the prompt's last row, which predicts the first token, sees what is kept (``steered``), or the
            prompt as the model made it (``plain``), so that answers of one token stay.
        profile: File with directions (``vlmfix profile --directions pti``); None takes the one in the model's folder.

    *Source*: "Prefill-time intervention", CVPR 2026, arXiv 2604.25642; code huaiyi66/PTI.

    *Differs*: the released code adds the first principal component to the mean: a unit vector whatever the size of the
    differences, with the sign of the picture that it says most of; the default leaves it out. The code fills the cache,
    turns it, and hands it to ``generate`` with the same ids; whether the last token then passes once more is up to the
    version of transformers. With ``first=steered`` it sees the turned cache in the prompt's own pass, its own column
    made of what it saw in earlier layers and turned as well, which is what passing once more in its place gives.
    Columns are found by their tokens, not by fixed numbers, and nothing is rounded to float16. Contrast rows, and rows
    without a picture, are left alone. In a chain, what other methods read of the prompt they read of the prompt as it
    was.

    *Cost*: one pass per token, and one more row of attention per layer for the prompt. Beside edits of attention, the
    prompt's edited rows twice.

    Example:
        >>> PTI(preset="text").spec()
        'pti:preset=text,columns=text,direction=mean,keys=0.1,values=0.6,first=steered,profile=none'
    """

    name: ClassVar[str] = "pti"
    source: ClassVar[Source] = Source(
        title="Prefill-time intervention", year=2026, arxiv="2604.25642", code="https://github.com/huaiyi66/PTI"
    )
    acts_on: ClassVar[str] = "the KV cache, of the prompt"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "full": {"columns": "both", "direction": "mean"},
        "text": {"columns": "text", "direction": "mean"},
        "official-code": {"columns": "both", "direction": "pca"},
    }

    preset: str = parameter("full", str, choices=("full", "text", "official-code"), help="which columns and direction")
    columns: str = parameter(None, str, choices=("both", "image", "text"), help="columns to turn")
    direction: str = parameter(None, str, choices=("mean", "pca"), help="mean difference, or with the first component")
    keys: float = parameter(0.1, float, low=0, high=100, search=(0.02, 1.0), log=True, help="lambda_K, of keys")
    values: float = parameter(0.6, float, low=0, high=100, search=(0.1, 3.0), log=True, help="lambda_V, of values")
    first: str = parameter(
        "steered", str, choices=("steered", "plain"), help="whether the first token's row sees what is kept"
    )
    profile: str | None = parameter(
        None, str, optional=True, file=True, help="file with directions; none: directions.safetensors of the model"
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of the prompt's part of the cache."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"pti cannot act: {reason}", "give profile=FILE")
        if not (self.keys or self.values) or not bool(layout.tokens.any()):
            return DecodingPlan()
        edit = Intervened(
            predicts=self.first == "steered",
            strengths=(self.keys, self.values),
            image=None if self.columns == "text" else self.of(vlm, "image"),
            text=None if self.columns == "image" else self.of(vlm, "text"),
        )
        return DecodingPlan(edits=(edit,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that directions are known for the model, of its sizes."""
        if not (self.keys or self.values):
            return None
        if reason := why_no_directions(vlm, self.name, self.profile):
            return reason
        try:
            for place in ("image", "text"):
                if self.columns in ("both", place):
                    self.of(vlm, place)
        except DataError as error:
            return error.message
        return None

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the file of directions, and their digest."""
        return directions_facts(vlm, self.name, self.profile) if self.keys or self.values else {}

    def of(self, vlm: Checkpoint, place: str) -> Tensor:
        """Reads the directions of ``image`` or ``text``, those of keys and of values: (L, 2, G, D) float32."""
        held = directions_for(vlm, self.name, self.profile)
        heads = vlm.model.config.get_text_config().num_key_value_heads
        found = []
        for kind in ("keys", "values"):
            one = held.tensor(f"{place}_{kind}_mean", vlm.layers, heads, None)
            if self.direction == "pca":
                one = one + held.tensor(f"{place}_{kind}_component", *one.shape)
            found.append(one)
        return torch.stack(found, dim=1).to(vlm.device)


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervened(PromptCacheEdit):
    """Turns the picture's columns and the prompt's last, of rows that have a picture.

    Attributes:
        predicts: See ``PromptCacheEdit``.
        strengths: lambda of keys, and of values.
        image: (L, 2, G, D) float32, directions of keys and of values for the picture's columns; None to leave them.
        text: The same for the last column.
    """

    predicts: bool
    strengths: tuple[float, float]
    image: Tensor | None
    text: Tensor | None
    of_prompt: ClassVar[frozenset[str]] = frozenset({"predicts", "strengths", "image", "text"})

    def kept(self, site: Site, columns: Column) -> Column:
        """Returns the turned columns."""
        shown = site.image_keys[:, : columns.keys.shape[2]]  # (B, T)
        last = torch.zeros_like(shown)
        last[:, -1] = shown.any(dim=1)  # prompts are padded on the left
        found = list(columns)
        for directions, turns in ((self.image, shown), (self.text, last)):
            if directions is None:
                continue
            for number, (strength, one) in enumerate(zip(self.strengths, found, strict=True)):
                new = turned(one, directions[site.layer, number][:, None], strength)
                found[number] = torch.where(turns[:, None, :, None], new, one.float())
        return Column(*found)


def turned(columns: Tensor, direction: Tensor, strength: float) -> Tensor:
    """Turns columns, (B, G, T, D), towards a direction, (G, 1, D), and keeps their lengths."""
    exact = columns.float()
    away = cosine_similarity(exact, -direction, dim=-1)[..., None].clamp(min=0)
    moved = normalize(exact, dim=-1) + strength * (1 + away) * normalize(direction, dim=-1)
    new: Tensor = exact.norm(dim=-1, keepdim=True) * normalize(moved, dim=-1)
    return new
