"""Retrieval heads: heads that look at the very token that is being written.

Shape letters (``docs/notation.md``): B rows, H query heads, K keys; here also N words' tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.edit import Site
from vlmfix.heads.profiler import State
from vlmfix.heads.profilers.needle import NeedleProfiler, Said
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Retrieval(NeedleProfiler):
    """Share of a needle's tokens that a head copies: at the step that writes token w, its attention peaks on a w.

        score = #{tokens w of the needle: argmax of the row that predicts w lies in the needle and on a w} / |needle|

    The prompt holds a needle of random words beside the question, and the answer is the needle.

    Source: Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574. *Differs*:
    the answer is given to the model and not generated, so that one pass has all steps and a model that copies badly
    has a profile too; with that, counting steps and counting tokens are the same. The hay is the picture. *Cost*: one
    pass of its own.

    Args:
        words: Length of the needle in words, from 1 to 40.
    """

    name: ClassVar[str] = "retrieval"
    title: ClassVar[str] = "share of tokens copied"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self.words)


class _State(State):
    shares: ClassVar[bool] = False

    def __init__(self, words: int) -> None:
        self._words = words

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        return work.stacked(copied(Said.of(work, self._words)))


def copied(said: Said) -> dict[int, Tensor]:
    """Share of each row's needle that each head copies when the model is made to say the needle.

    Returns:
        Layer number -> (B, H), in [0, 1].
    """
    ids, answer = said.work.batch["input_ids"], said.answer
    steps = answer.shape[1]
    counts = torch.zeros_like(answer, dtype=torch.bool)
    needle = torch.zeros_like(ids, dtype=torch.bool)
    for row, place in enumerate(said.places):
        counts[row, : len(place)] = True
        needle[row, place] = True
    found: dict[int, Tensor] = {}

    def read(site: Site, weights: Tensor) -> None:
        peak = weights[:, :, -steps - 1 : -1].argmax(dim=-1)  # (B, H, N), the rows that predict the answer
        inside = pad(needle, (0, steps))  # (B, K)
        every = torch.cat([ids, answer], dim=1)  # (B, K)
        heads = peak.shape[1]
        on = inside[:, None].expand(-1, heads, -1).gather(2, peak)  # (B, H, N)
        same = every[:, None].expand(-1, heads, -1).gather(2, peak) == answer[:, None]
        hits = (on & same & counts[:, None]).sum(dim=2)  # (B, H)
        found[site.layer] = hits / counts.sum(dim=1)[:, None]

    said.watched(read)
    return found
