"""The step over a prompt's last token, again and again, behind the cache of the tokens before it.

Shape letters (``docs/notation.md``): T prompt tokens, V vocabulary; here also N copies of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfix.attention.edit import AttentionEdit
from vlmfix.attention.probe import shared_prompt
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Ran, Work
from vlmfix.models.layout import ImageLayout

SCALE = 1024.0
"""Factor on what is differentiated, so that small gradients survive float16."""


class LastStep:
    """One row's last prompt token, in any number of copies that share the keys and values of the prompt.

    Gradients reach what edits bring into the step and stop at the cache.

    Args:
        work: The batch.
        ran: Its pass, with a cache.
        row: The row.

    Attributes:
        token: The most probable next token.
        device: Where the step runs.
        bytes: Memory that one more copy takes: keys and values of the layer under way.
    """

    def __init__(self, work: Work, ran: Ran, row: int) -> None:
        if ran.cache is None:
            raise RuntimeError("the shared pass kept no cache")
        own = slice(row, row + 1)
        layout = work.layout
        self._vlm = work.vlm
        self._layout = ImageLayout(*(part[own] for part in (layout.tokens, layout.text, layout.image, layout.boxes)))
        self._mask = work.batch.attention_mask[own]  # (1, T)
        self._cache, self._row = ran.cache, row
        embeds, positions = ran.inputs["inputs_embeds"], ran.inputs.get("position_ids")
        self._embeds = embeds[own, -1:]  # (1, 1, hidden size)
        self._positions: Tensor | None = None
        if positions is not None:
            self._positions = positions.expand(*positions.shape[:-2], len(embeds), -1)[..., own, -1:]  # (..., 1, 1)
        self.token = int(ran.logits[row].argmax())
        self.device = embeds.device
        first: Any = ran.cache.layers[0]
        self.bytes = int(first.keys[own].nbytes + first.values[own].nbytes)

    def logits(self, edits: Sequence[AttentionEdit], *, copies: int = 1) -> Tensor:
        """(N, V) float32 logits of the next token in each copy, with edits at work in this step.

        Args:
            edits: The edits.
            copies: N.
        """
        model: Any = self._vlm.model
        decoder: Any = self._vlm.family.decoder(model)
        positions = self._positions
        if positions is not None:
            positions = positions.expand(*positions.shape[:-2], copies, -1)  # (..., N, 1)
        with edited(self._vlm, self._layout.expand(copies), edits):
            output = decoder(
                inputs_embeds=self._embeds.expand(copies, -1, -1),
                attention_mask=self._mask.expand(copies, -1),
                position_ids=positions,
                past_key_values=shared_prompt(self._cache, self._row, self._mask.shape[1] - 1),
                use_cache=True,
            )
        return torch.as_tensor(model.get_output_embeddings()(output.last_hidden_state[:, -1])).float()
