"""Holds the pictures that directions are measured on, and runs the passes over a prompt and what is said behind it.

Shape letters (``docs/notation.md``): B rows, T tokens, L layers, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfix.attention.probe import leaving
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch
from vlmfix.upstream.names import TYPES, name_of
from vlmfix.upstream.positions import prompt_positions


@dataclass(frozen=True, eq=False)
class Shown:
    """Holds one picture, and what is known of it.

    Attributes:
        picture: RGB.
        objects: Names of the objects that ``caption`` names.
        caption: A caption that is true.
        planted: The same caption with an object in it that is not in the picture.
        emptied: The caption without the words of ``objects``.
        mask: (height, width) bool, pixels of objects; None where no method needs it.
    """

    picture: Image.Image
    objects: tuple[str, ...]
    caption: str
    planted: str
    emptied: str
    mask: Tensor | None = None


def answered(vlm: Checkpoint, question: str, picture: Image.Image, answer: str) -> Batch:
    """Encodes a question about a picture with an answer behind it, as one row.

    The answer is split into tokens as it stands alone.

    Raises:
        DataError: They are longer than the model's context.
    """
    batch = vlm.encode([question], [[picture]])
    said = vlm.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    room_for_answers(vlm, batch.lengths, wanted=max(len(said), 1))
    tokens = torch.tensor([said], dtype=torch.int64, device=batch["input_ids"].device).view(1, -1)
    longer = {"input_ids": torch.cat([batch["input_ids"], tokens], dim=1)}
    longer["attention_mask"] = torch.cat([batch.attention_mask, torch.ones_like(tokens)], dim=1)
    longer |= {
        name: torch.cat([batch[name], torch.zeros_like(tokens, dtype=batch[name].dtype)], dim=1)
        for name in TYPES
        if name in batch
    }
    return batch.with_inputs(**longer)


@torch.no_grad()
def streams(vlm: Checkpoint, batch: Batch) -> Tensor:
    """Reads the residual stream that leaves each layer, of a batch of one row: (L, T, D) float32."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int, stream: Tensor) -> None:
        seen[layer] = stream[0].float()

    model: Any = vlm.model
    positions = {name_of(type(model), "positions"): prompt_positions(model, batch)}
    with leaving(vlm, keep):
        model(**batch, **positions, use_cache=False, logits_to_keep=1)
    return torch.stack([stream.to(vlm.device) for _, stream in sorted(seen.items())])
