"""One batch of single questions about single pictures, and what a pass over it left behind.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, eq=False)
class Work:
    """One batch to look at: one question about B pictures.

    Attributes:
        vlm: The model.
        batch: The encoded prompts, one picture each.
        layout: Their layout.
        first: Number of the first row's picture, from 0.
        seed: Seed of the profile.
    """

    vlm: Checkpoint
    batch: Batch
    layout: ImageLayout
    first: int
    seed: int

    @property
    def layers(self) -> int:
        """L."""
        return self.vlm.layers

    @property
    def heads(self) -> int:
        """H."""
        return self.vlm.heads

    def random(self, row: int) -> Random:
        """A source for what is drawn for one row; it depends on the seed and the picture's number alone."""
        return Random(f"{self.seed}, {self.first + row}")

    def stacked(self, found: Mapping[int, Tensor]) -> Tensor:
        """Scores by layer, (B, H) each, as (B, L, H); zeros for layers that have none."""
        empty = torch.zeros(self.batch.rows, self.heads, device=self.vlm.device)
        return torch.stack([found.get(layer, empty).float() for layer in range(self.layers)], dim=1)  # (B, L, H)


@dataclass(frozen=True, eq=False)
class Ran:
    """What the shared pass left behind.

    Attributes:
        logits: (B, V) of the last row.
        cache: Keys and values of the prompt, when a state keeps the cache.
        positions: (B, T) or (3 or 4, B, T) position ids.
    """

    logits: Tensor
    cache: DynamicCache | None
    positions: Tensor
