"""Zero ablation: what the model's next word loses when one head is switched off.

Shape letters (``docs/notation.md``): L layers, H query heads, T prompt tokens; here also N copies of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.probe import Gates
from vlmfix.heads.last_step import SCALE, LastStep
from vlmfix.heads.moments import Moments, rank_correlation
from vlmfix.heads.profiler import Profiler, Ran, State, Work
from vlmfix.models.checkpoint import Checkpoint

MEMORY = 1 << 30
"""Bytes that the copies of one pass may take for a layer's keys and values."""


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
        copies: Ablated copies per pass, at least 1; fewer when their keys and values of one layer, which is what a copy
            takes, would need more than ``MEMORY``.
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
        shape = (work.layers, work.heads)
        steps = [LastStep(work, ran, row) for row in range(work.batch.rows)]
        exact = torch.stack([lost(step, *shape, self._copies) for step in steps])  # (B, L, H)
        first = torch.stack([first_order(step, *shape) for step in steps])
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


@torch.no_grad()
def lost(step: LastStep, layers: int, heads: int, copies: int) -> Tensor:
    """(L, H) loss of probability when each head is switched off alone, at most ``copies`` of them per pass."""
    found = []
    copies = max(1, min(copies, MEMORY // step.bytes - 1))
    for start in range(0, layers * heads, copies):
        off = torch.arange(start, min(start + copies, layers * heads))  # (N,)
        gates = torch.ones(
            layers, 1 + len(off), heads
        )  # the whole model is a row too: rounding depends on their number
        gates[off // heads, 1 + torch.arange(len(off)), off % heads] = 0.0
        left = _probability(step, gates)
        found.append(left[0] - left[1:])
    return torch.cat(found).view(layers, heads)


@torch.enable_grad()
def first_order(step: LastStep, layers: int, heads: int) -> Tensor:
    """(L, H) the same by the gradient of the gates."""
    gates = torch.ones(layers, 1, heads).requires_grad_()
    (slope,) = torch.autograd.grad(SCALE * _probability(step, gates).sum(), gates)
    return slope[:, 0] / SCALE  # (L, H)


def _probability(step: LastStep, gates: Tensor) -> Tensor:
    """(N,) probability of the next token in each of N copies, for (L, N, H) gates on the last token's head outputs."""
    logits = step.logits([Gates(gates=gates.to(step.device))], copies=gates.shape[1])
    return logits.softmax(dim=-1)[:, step.token]
