"""The step over a row's newest token, again and again, behind the cache of the tokens before it.

Shape letters (``docs/notation.md``): V vocabulary; here also S tokens seen so far and N copies of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.attention.edit import AttentionEdit
from vlmfix.attention.session import edited
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import ImageLayout
from vlmfix.upstream.cache import keys_and_values, shared_prompt
from vlmfix.upstream.names import name_of

SCALE = 1024.0
"""Factor on what is differentiated, so that small gradients survive float16."""
MEMORY = 1 << 30
"""Bytes that the copies of one pass may take for a layer's keys and values."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LastStep:
    """One row's newest token, in any number of copies that share the keys and values of what stands before it.

    Gradients reach what edits bring into the step and stop at the cache.

    Attributes:
        vlm: The model.
        layout: Layout of the row's prompt.
        mask: (1, S) which tokens are real, the newest one last.
        newest: The newest token.
        position: (1, 1) or (3 or 4, 1, 1), its position.
        cache: Keys and values of the batch, of S tokens or more.
        row: The row of the batch.
        token: The token that follows.
    """

    vlm: Checkpoint
    layout: ImageLayout
    mask: Tensor
    newest: int
    position: Tensor
    cache: DynamicCache
    row: int
    token: int

    @classmethod
    def of(cls, work: Work, ran: Ran, row: int) -> Self:
        """The step over the last token of a prompt; the most probable token follows.

        Args:
            work: The batch.
            ran: Its pass, with a cache.
            row: The row.
        """
        if ran.cache is None:
            raise RuntimeError("the shared pass kept no cache")
        said = (int(ran.logits[row].argmax()),)
        return cls.behind(work, row, positions=ran.positions, cache=ran.cache, said=said, place=0)

    @classmethod
    def behind(
        cls, work: Work, row: int, *, positions: Tensor, cache: DynamicCache, said: Sequence[int], place: int
    ) -> Self:
        """The step that chose a token of an answer.

        Args:
            work: The batch.
            row: The row.
            positions: (..., B, T) those of the prompts.
            cache: Keys and values of the batch, of what stands before that token at least.
            said: The row's answer.
            place: Number of the token in it, from 0.
        """
        own, layout = slice(row, row + 1), work.layout
        mask = work.batch.attention_mask[own]  # (1, T)
        return cls(
            vlm=work.vlm,
            layout=ImageLayout(*(part[own] for part in (layout.tokens, layout.text, layout.image, layout.boxes))),
            mask=torch.cat([mask, mask.new_ones(1, place)], dim=1),  # (1, S)
            newest=said[place - 1] if place else int(work.batch["input_ids"][row, -1]),
            position=positions[..., own, -1:] + place,
            cache=cache,
            row=row,
            token=said[place],
        )

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self.mask.device

    def copies(self, wanted: int) -> int:
        """How many copies beside the row itself one pass may have: as many as wanted, or what ``MEMORY`` allows."""
        keys, values = keys_and_values(self.cache)[0]
        one = int(keys[self.row].nbytes + values[self.row].nbytes)
        return max(1, min(wanted, MEMORY // one - 1))

    def logits(self, edits: Sequence[AttentionEdit], *, copies: int = 1) -> Tensor:
        """(N, V) float32 logits of the next token in each copy, with edits at work in this step.

        Args:
            edits: The edits.
            copies: N.
        """
        model: Any = self.vlm.model
        values = {
            "ids": self.mask.new_full((copies, 1), self.newest),
            "positions": self.position.expand(*self.position.shape[:-2], copies, -1),
            "mask": self.mask.expand(copies, -1),
            "cache": shared_prompt(self.cache, self.row, self.mask.shape[1] - 1),
        }
        given = {name_of(type(model), name): value for name, value in values.items()}
        with edited(self.vlm, self.layout.expand(copies), edits):
            output = model(**given, use_cache=True, logits_to_keep=1, return_dict=True)
        return torch.as_tensor(output.logits[:, -1]).float()
