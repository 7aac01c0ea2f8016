"""How much of a head's attention goes to the first token, the usual sink."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfix.extend import Checkpoint, LastRows, Profiler, Ran, Site, State, Work, edited


@dataclass(frozen=True, kw_only=True)
class FirstToken(Profiler):
    """Attention of the token that predicts the answer's first word to the prompt's first token, in [0, 1]."""

    name: ClassVar[str] = "first-token"
    title: ClassVar[str] = "attention to the first token"

    def begin(self, vlm: Checkpoint) -> State:
        """Begins a measurement."""
        return Watching()


class Watching(State):
    """Reads one row of attention in each layer of the shared pass."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        """Has the reading at work inside the block."""
        with edited(work.vlm, work.layout, [LastRows(reader=self._read)]):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        first = site.allowed[:, 0, -1].long().argmax(dim=-1)  # (1 or B,), behind the padding
        first = first.expand(weights.shape[0])
        self._found[site.layer] = weights[:, :, -1].gather(2, first[:, None, None].expand(-1, weights.shape[1], 1))[
            ..., 0
        ]

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        """Returns (B, L, H)."""
        return work.stacked(self._found)
