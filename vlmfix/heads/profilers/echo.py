"""Echo and induction heads: heads that look back at where the same words stood before.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, K keys; here also N words' tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.heads.profiler import State
from vlmfix.heads.profilers.needle import NeedleProfiler, Said
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Echo(NeedleProfiler):
    """Attention that tokens said again give to where they stood before, and to what came next there.

        echo = mean over repeated tokens i of a[i, first place of i]
        induction = mean over repeated tokens i but the last of a[i, first place of i's successor]
        score = echo + induction, in [0, 1]

    The prompt holds random words, and the answer that is given to the model says them again. ``details`` has both
    parts, (L, H). An echo head finds the word again; an induction head, one place further, what to write next, which
    is how an answer repeats what was said.

    Source: duplicate-token and induction heads, Olsson et al., "In-context Learning and Induction Heads", arXiv
    2209.11895. *Differs*: there a whole sequence of random tokens is repeated; here random words, in the model's own
    prompt with its picture. *Cost*: one pass of its own.

    Args:
        words: Words that are repeated, from 1 to 40.
    """

    name: ClassVar[str] = "echo"
    title: ClassVar[str] = "attention to the same words before"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self.words)


class _State(State):
    shares: ClassVar[bool] = False

    def __init__(self, words: int) -> None:
        self._words = words
        self._sums: dict[str, Tensor] = {}
        self._pictures = 0

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        said = Said.of(work, self._words)
        echo: dict[int, Tensor] = {}
        induction: dict[int, Tensor] = {}

        def read(site: Site, weights: Tensor) -> None:
            rows = weights[:, :, -said.answer.shape[1] :]  # (B, H, N, K)
            echo[site.layer] = torch.stack([_along(own, place) for own, place in zip(rows, said.places, strict=True)])
            after = [_along(own, place[1:]) for own, place in zip(rows, said.places, strict=True)]
            induction[site.layer] = torch.stack(after)

        said.watched(read)
        parts = {"echo": work.stacked(echo), "induction": work.stacked(induction)}
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + part.sum(dim=0).cpu()
        self._pictures += work.batch.rows
        return parts["echo"] + parts["induction"]

    def details(self) -> dict[str, Tensor]:
        return {name: total / self._pictures for name, total in self._sums.items()}


def _along(rows: Tensor, columns: list[int]) -> Tensor:
    """(H,) mean of the attention that the first rows of (H, N, K) give to one column each; 0 without columns."""
    if not columns:
        return rows.new_zeros(len(rows))
    return rows[:, range(len(columns)), columns].mean(dim=1)
