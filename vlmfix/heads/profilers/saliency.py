"""Saliency: how much of what a head sees in the picture decides the model's next token.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.decoding.newest import Recorder
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.last_step import SCALE, LastStep
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Saliency(Profiler):
    """Attention to the picture, times the gradient of the loss of the model's own next token y.

        score = sum over image patches j of | a[last, j] * d(-log p(y)) / d a[last, j] |

    Source: the attention-gradient product of "Hallucination Begins Where Saliency Drops", ICLR 2026, arXiv 2601.20279,
    eq. 2-4. *Differs*: the paper merges the heads of a layer and looks at the keys of earlier output; here heads are
    kept apart, the picture's keys are summed, and nothing is normalised, so that heads can be compared. *Cost*: one
    backward pass through one step.
    """

    name: ClassVar[str] = "saliency"
    title: ClassVar[str] = "picture attention times gradient"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State()


class _State(State):
    keeps_cache: ClassVar[bool] = True

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        if ran is None:
            raise RuntimeError("the shared pass did not run")
        image = work.layout.tokens
        return torch.stack(
            [_row(LastStep.of(work, ran, row), image[row]) for row in range(work.batch.rows)]
        )  # (B, L, H)


@torch.enable_grad()
def _row(step: LastStep, image: Tensor) -> Tensor:
    """(L, H) of one row; ``image`` (T,) marks its patches."""
    recorder = Recorder(first=0)
    loss = -SCALE * step.logits([recorder]).log_softmax(dim=-1)[0, step.token]
    seen = [recorder.seen[layer] for layer in sorted(recorder.seen)]  # each (1, H, 1, K)
    slopes = torch.autograd.grad(loss, seen)
    products = [(weights * slope).abs() for weights, slope in zip(seen, slopes, strict=True)]
    return torch.stack([product[0, :, 0, image].sum(dim=-1) for product in products]).detach() / SCALE
