"""How far back heads look, and how much later tokens look at what was just read.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, R query rows, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import TextRows, mean_of_rows
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Influence(Profiler):
    """Windowed attention distance: how far back a head looks, where everything far counts alike.

        score = mean over the prompt's text rows i behind the picture of  sum over j of a[i, j] min(i - j, window)

    in [0, window]: 0 for a head that looks at the token itself. ``details`` has ``future``, (L, H): the future
    attention influence of the text behind the picture, mean over its tokens j that have such rows and over pictures,

        future[j] = mean over rows i with near <= i - j <= far of a[i, j]

    which is large for a head that comes back to few words; NaN where the text is shorter than ``near``.

    Source: "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm", arXiv 2510.13554. *Differs*: its
    definitions are known second hand, and ask for generated text of some hundred tokens; this reads the prompt's text,
    so ``near`` is smaller than there. *Cost*: the text rows of the shared pass.

    Args:
        window: Distance from which all counts alike, at least 1.
        near: Least distance of future rows, at least 1.
        far: Largest distance of future rows, at least ``near``.
    """

    name: ClassVar[str] = "influence"
    title: ClassVar[str] = "windowed attention distance"

    window: int = 10
    near: int = 4
    far: int = 50

    def __post_init__(self) -> None:
        self._require(self.window >= 1, "window", "at least 1")
        self._require(self.near >= 1, "near", "at least 1")
        self._require(self.far >= self.near, "far", f"at least near, {self.near}")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self)


class _State(State):
    def __init__(self, own: Influence) -> None:
        self._own = own
        self._distances: dict[int, Tensor] = {}
        self._future: dict[int, Tensor] = {}
        self._sum = torch.zeros(1)
        self._pictures = 0

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        with edited(work.vlm, work.layout, [TextRows(reader=self._read)]):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        rows = site.queries[0]  # (R,)
        back = rows[:, None] - torch.arange(weights.shape[-1], device=rows.device)  # (R, K)
        away = back.clamp(0, self._own.window).to(weights.dtype)
        self._distances[site.layer] = mean_of_rows((weights * away).sum(dim=-1), site.acts)  # (B, H)
        later = (back >= self._own.near) & (back <= self._own.far)  # (R, K)
        pairs = site.acts[:, :, None] & later  # (B, R, K)
        texts = torch.zeros_like(site.text_keys)
        texts[:, rows] = site.acts  # (B, K), the columns of the rows
        pairs = (pairs & texts[:, None]).to(weights.dtype)
        received = torch.einsum("bhrk,brk->bhk", weights, pairs)
        counts = pairs.sum(dim=1)  # (B, K)
        means = received / counts.clamp(min=1)[:, None]
        self._future[site.layer] = means.sum(dim=-1) / (counts > 0).sum(dim=-1)[:, None]  # (B, H), NaN without any

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        future = work.stacked(self._future)  # (B, L, H)
        known = future.isfinite().all(dim=2).all(dim=1)
        self._sum = self._sum + future[known].sum(dim=0).cpu()
        self._pictures += int(known.sum())
        return work.stacked(self._distances)

    def details(self) -> dict[str, Tensor]:
        return {"future": self._sum / self._pictures if self._pictures else self._sum * torch.nan}
