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
from vlmfix.upstream.text import TextInputs, call

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
        embeds: (1, 1, hidden size) embedding of the newest token.
        positions: (..., 1, 1) its position, when the model was told one.
        cache: Keys and values of the batch, of S tokens or more.
        row: The row of the batch.
        token: The token that follows.
    """

    vlm: Checkpoint
    layout: ImageLayout
    mask: Tensor
    embeds: Tensor
    positions: Tensor | None
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
        return cls.behind(work, row, inputs=ran.inputs, cache=ran.cache, token=int(ran.logits[row].argmax()))

    @classmethod
    def behind(
        cls, work: Work, row: int, *, inputs: TextInputs, cache: DynamicCache, token: int, generated: int = 0
    ) -> Self:
        """The step over the newest token of a pass.

        Args:
            work: The batch.
            row: The row.
            inputs: What the text decoder was called with in that pass.
            cache: Keys and values of the batch, of what was before that pass and in it at least.
            token: The token that follows.
            generated: How many tokens stand behind the prompt.
        """
        own, layout = slice(row, row + 1), work.layout
        embeds, positions = inputs.embeds, inputs.positions
        if positions is not None:
            positions = positions.expand(*positions.shape[:-2], len(embeds), -1)[..., own, -1:]  # (..., 1, 1)
        mask = work.batch.attention_mask[own]  # (1, T)
        return cls(
            vlm=work.vlm,
            layout=ImageLayout(*(part[own] for part in (layout.tokens, layout.text, layout.image, layout.boxes))),
            mask=torch.cat([mask, mask.new_ones(1, generated)], dim=1),  # (1, S)
            embeds=embeds[own, -1:],  # (1, 1, hidden size)
            positions=positions,
            cache=cache,
            row=row,
            token=token,
        )

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self.embeds.device

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
        positions = self.positions
        if positions is not None:
            positions = positions.expand(*positions.shape[:-2], copies, -1)  # (..., N, 1)
        with edited(self.vlm, self.layout.expand(copies), edits):
            states = call(
                self.vlm.family.decoder(model),
                TextInputs(embeds=self.embeds.expand(copies, -1, -1), positions=positions),
                mask=self.mask.expand(copies, -1),
                cache=shared_prompt(self.cache, self.row, self.mask.shape[1] - 1),
            )
        return torch.as_tensor(model.get_output_embeddings()(states[:, -1])).float()
