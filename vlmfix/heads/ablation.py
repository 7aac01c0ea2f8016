"""Zero ablation: what the model's next word loses when one head is switched off.

Shape letters (``docs/notation.md``): L layers, H query heads, T prompt tokens; here also N copies of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.attention.probe import Gates, shared_prompt
from vlmfix.attention.session import edited
from vlmfix.heads.moments import Moments, rank_correlation
from vlmfix.heads.profiler import Profiler, Ran, State, Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import ImageLayout

SCALE = 1024.0
"""Factor on what is differentiated, so that small gradients survive float16."""


@dataclass(frozen=True, kw_only=True)
class Ablation(Profiler):
    """What a head adds to the probability of the model's own next token y.

        score = p(y) - p(y | output of the head set to 0 at the last position)

    Positive: the head supports what the model says. ``details`` has the first-order estimate of the same, from one
    backward pass (d p(y) / d m of a gate m = 1 on every head), as ``first_order`` (L, H), and Spearman's correlation of
    the two means over all heads as ``rank_correlation``; NaN when either gives all heads the same.

    Source: the attribution of AD-HH (Yang et al., ICLR 2025, code TianyunYoung/Hallucination-Attribution).
    *Differs*: AD-HH subtracts the mean over words for objects that are there from that over hallucinated ones, which
    needs annotated captions; this takes the next token of any prompt. The head is switched off at the last position
    alone, as AD-HH does in decoding; for an answer's first token AD-HH switches it off in the whole prompt. *Cost*:
    L * H one-token steps, ``copies`` at a time as rows of one pass that share the prompt's keys and values, and one
    backward pass through one step.

    Args:
        copies: Ablated copies per pass, at least 1; memory for the keys and values of one layer grows with it.
    """

    name: ClassVar[str] = "ablation"
    title: ClassVar[str] = "support of the next token"

    copies: int = 32

    def __post_init__(self) -> None:
        self._require(self.copies >= 1, "copies", "at least 1")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self.copies)


class _State(State):
    keeps_cache: ClassVar[bool] = True

    def __init__(self, copies: int) -> None:
        self._copies = copies
        self._exact: Moments | None = None
        self._first: Moments | None = None

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        if ran is None:
            raise RuntimeError("the shared pass did not run")
        steps = [LastStep(work, ran, row) for row in range(work.batch.rows)]
        exact = torch.stack([step.exact(self._copies) for step in steps])  # (B, L, H)
        first = torch.stack([step.first_order() for step in steps])
        none = Moments.empty(work.layers, work.heads)
        self._exact = (self._exact or none).added(exact.double().cpu())
        self._first = (self._first or none).added(first.double().cpu())
        return exact

    def details(self) -> dict[str, Tensor]:
        if self._exact is None or self._first is None:
            return {}
        agreement = rank_correlation(self._exact.mean, self._first.mean)
        return {
            "first_order": self._first.mean.float(),
            "rank_correlation": torch.tensor([torch.nan if agreement is None else agreement]),
        }


class LastStep:
    """The step over a row's last prompt token, with gates on the heads, behind the cache of the tokens before it.

    Args:
        work: The batch.
        ran: Its pass, with a cache.
        row: The row.

    Attributes:
        token: The most probable next token.
    """

    def __init__(self, work: Work, ran: Ran, row: int) -> None:
        self._vlm, self._ran, self._row = work.vlm, ran, row
        self._shape = (work.layers, work.heads)
        self._mask = work.batch.attention_mask[row : row + 1]  # (1, T)
        layout = work.layout
        parts = (layout.tokens, layout.text, layout.image, layout.boxes)
        self._layout = ImageLayout(*(part[row : row + 1] for part in parts))
        self.token = int(ran.logits[row].argmax())

    def probability(self, gates: Tensor) -> Tensor:
        """(N,) probability of the token in each of N copies, for (L, N, H) gates on the last token's head outputs."""
        if self._ran.cache is None:
            raise RuntimeError("the shared pass kept no cache")
        given, copies = self._ran.inputs, gates.shape[1]
        row, length = slice(self._row, self._row + 1), self._mask.shape[1]
        embeds = given["inputs_embeds"]
        positions = given.get("position_ids")
        if positions is not None:
            positions = positions.expand(*positions.shape[:-2], len(embeds), -1)[..., row, -1:]
            positions = positions.expand(*positions.shape[:-2], copies, -1)  # (..., N, 1)
        model: Any = self._vlm.model
        decoder: Any = self._vlm.family.decoder(model)
        with edited(self._vlm, self._layout.expand(copies), [Gates(gates=gates)]):
            output = decoder(
                inputs_embeds=embeds[row, -1:].expand(copies, -1, -1),
                attention_mask=self._mask.expand(copies, -1),
                position_ids=positions,
                past_key_values=shared_prompt(self._ran.cache, self._row, length - 1),
                use_cache=True,
            )
        logits: Tensor = model.get_output_embeddings()(output.last_hidden_state[:, -1])  # (N, V)
        return logits.float().softmax(dim=-1)[:, self.token]

    @torch.no_grad()
    def exact(self, copies: int) -> Tensor:
        """(L, H) loss of probability when each head is switched off alone."""
        layers, heads = self._shape
        lost = []
        for start in range(0, layers * heads, copies):
            off = torch.arange(start, min(start + copies, layers * heads))  # (N,)
            gates = self._open(1 + len(off))  # the whole model is a row too: rounding depends on the number of rows
            gates[off // heads, 1 + torch.arange(len(off)), off % heads] = 0.0
            found = self.probability(gates)
            lost.append(found[0] - found[1:])
        return torch.cat(lost).view(layers, heads)

    @torch.enable_grad()
    def first_order(self) -> Tensor:
        """(L, H) the same by the gradient of the gates."""
        gates = self._open(1).requires_grad_()
        (slope,) = torch.autograd.grad(SCALE * self.probability(gates).sum(), gates)
        return slope[:, 0] / SCALE  # (L, H)

    def _open(self, copies: int) -> Tensor:
        layers, heads = self._shape
        return torch.ones(layers, copies, heads, device=self._vlm.device)
