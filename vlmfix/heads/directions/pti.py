"""Directions for `pti`: in keys and values, from backgrounds to objects, and from captions without objects to objects.

Shape letters (``docs/notation.md``): L layers, G key/value heads, D head dimension, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from vlmfix.errors import DataError
from vlmfix.heads.directions.component import first_component
from vlmfix.heads.directions.method import Differences, Measurement
from vlmfix.heads.directions.shown import Shown
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch
from vlmfix.upstream.cache import handed_over, keys_and_values
from vlmfix.upstream.names import name_of
from vlmfix.upstream.positions import prompt_positions

PARTS = tuple(f"{place}_{kind}" for place in ("image", "text") for kind in ("keys", "values"))
"""Names of the directions, each with its mean and its component."""


@dataclass(frozen=True, kw_only=True)
class Interventions(Measurement):
    """Measures for each layer how keys and values in the KV cache differ where the prompt has objects.

    ``image_keys`` and ``image_values``, the mean over the picture's tokens: of the picture's objects alone, minus of
    its background alone, with zeros elsewhere. ``text_keys`` and ``text_values``, at the prompt's last token: of a
    prompt that lists the objects, minus of one that is the caption without their words. Each has a mean over pictures,
    as ``..._mean``, and the first principal component over all heads of a layer together, as ``..._component``; all are
    (L, G, D). Keys are taken behind the rotary embedding, as the cache has them.
    """

    name: ClassVar[str] = "pti"
    needs_mask: ClassVar[bool] = True

    def begin(self, vlm: Checkpoint, question: str, seed: int) -> Differences:
        """Begins a measurement."""
        return _Interventions(vlm, question)


class _Interventions(Differences):
    def __init__(self, vlm: Checkpoint, question: str) -> None:
        self._vlm, self._question = vlm, question
        self._image: list[Tensor] = []
        self._text: list[Tensor] = []

    def add(self, shown: Shown, number: int) -> None:
        """Measures both differences; that of the picture where its mask leaves objects and a background."""
        vlm = self._vlm
        if shown.mask is None:
            raise DataError("pictures without masks say nothing for pti", "give the outlines of objects")
        if bool(shown.mask.any()) and not bool(shown.mask.all()):
            objects, background = (
                self._kept(vlm.encode([self._question], [[masked(shown.picture, mask)]]), last=False)
                for mask in (shown.mask, ~shown.mask)
            )
            self._image.append(objects - background)
        listed, emptied = (
            self._kept(vlm.encode([said], [[shown.picture]]), last=True)
            for said in (f"{', '.join(shown.objects)}.", shown.emptied)
        )
        self._text.append(listed - emptied)

    def _kept(self, batch: Batch, *, last: bool) -> Tensor:
        """Reads (L, 2, G, D) keys and values: at the last token of one prompt, or the mean over its picture's."""
        columns = self._vlm.layout(batch).tokens[0]  # (T,)
        kept = [torch.stack(pair)[:, 0] for pair in prompt_cache(self._vlm, batch)]  # (2, G, T, D) each
        found = [part[:, :, -1] if last else part[:, :, columns.to(part.device)].float().mean(dim=2) for part in kept]
        return torch.stack([part.float().cpu() for part in found])

    def tensors(self) -> dict[str, Tensor]:
        """Returns means and first components."""
        if len(self._image) < 2:
            raise DataError(
                f"{len(self._image)} pictures have objects and a background", "show more pictures with outlines"
            )
        found = {}
        for place, rows in (("image", torch.stack(self._image)), ("text", torch.stack(self._text))):
            for number, kind in enumerate(("keys", "values")):
                own = rows[:, :, number]  # (N, L, G, D)
                found[f"{place}_{kind}_mean"] = own.mean(dim=0)
                components = [first_component(own[:, layer].flatten(1)) for layer in range(own.shape[1])]
                found[f"{place}_{kind}_component"] = torch.stack(components).view(own.shape[1:])
        return found


@torch.no_grad()
def prompt_cache(vlm: Checkpoint, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Runs a prompt; returns the keys and values that each layer keeps of it, (B, G, T, D) each."""
    room_for_answers(vlm, batch.lengths)
    model: Any = vlm.model
    cache = DynamicCache()
    positions = {name_of(type(model), "positions"): prompt_positions(model, batch)}
    model(**batch, **positions, **handed_over(model, cache), use_cache=True, logits_to_keep=1)
    return keys_and_values(cache)


def masked(picture: Image.Image, mask: Tensor) -> Image.Image:
    """Returns a picture that is black where a (height, width) bool mask is False."""
    return Image.fromarray(np.asarray(picture) * mask.numpy()[:, :, None].astype(np.uint8))
