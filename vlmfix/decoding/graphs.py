"""Steps recorded as CUDA graphs: a step is then one launch, and no longer waits for the host between its kernels.

A step of a model of some billion parameters is hundreds of small kernels, which a host launches more slowly than the
GPU runs them. A recorded step reads and writes the same memory every time: tokens, positions, mask and a static cache
stand in buffers, and what edits know of the rows is what they knew when it was recorded. Rows that have ended stay in
it until half of them have; what is left is then recorded anew.

Shape letters (``docs/notation.md``): R rows that go on, G rows in the recorded step, K keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from vlmfix.upstream import cache as caches

AFTER = 4
"""Steps that are not recorded: recording costs about as much as three, and short answers end before it pays."""


ROOM = 256
"""Most tokens that a recording has room for: memory for a long answer is taken as it grows."""


class Replay(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Runs it once more."""


def captured(once: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
    """Runs a step once, and records it.

    Args:
        once: The step; it reads and writes the same memory whenever it is called.
        device: Where it runs.

    Returns:
        The recording, and what its latest run returned.
    """
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # what libraries set up at their first call must not be recorded
        once()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = once()  # recorded, and not run
    return graph, result


class Recorded:
    """The step of one call, recorded for its present rows.

    Args:
        model: The model, with the edits at work on it.
        step: Calls the model, with (G, 1) tokens, (..., G, 1) positions, a (G, 1, 1, K) bool mask and a cache; returns
            its (G, V) float32 logits.
        cache: Dynamic cache of the tokens so far, without sliding layers; its memory may be given back afterwards.
        mask: (G, tokens so far), 1 where a token is real.
        positions: (..., G, 1), those of the newest token.
        room: Tokens that may follow.
        held: What the recorded step reads and somebody may replace meanwhile, edits for instance; kept alive with it.

    Raises:
        UpstreamError: The installed transformers' static cache counts otherwise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        step: Callable[[Tensor, Tensor, Tensor, Cache], Tensor],
        cache: Cache,
        mask: Tensor,
        positions: Tensor,
        room: int,
        held: object,
    ) -> None:
        rows, seen = mask.shape
        self.rows = torch.arange(rows, device=mask.device)
        self.tokens, self._capacity = seen, seen + room
        self._model, self._held = model, held
        self._cache = caches.preallocated(model, cache, seen + room)
        self._real = torch.ones(rows, seen + room, dtype=torch.bool, device=mask.device)
        self._real[:, :seen] = mask.bool()
        self._column = torch.full((1,), seen, device=mask.device)
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=mask.device)
        self._positions = positions + 1
        self._keys = torch.arange(seen + room, device=mask.device)

        def once() -> Tensor:
            visible = (self._real & (self._keys <= self._column))[:, None, None]  # (G, 1, 1, K)
            logits = step(self._ids, self._positions, visible, self._cache)
            self._positions.add_(1)
            self._column.add_(1)
            return logits

        counts = [*caches.counters(self._cache), self._positions, self._column]
        before = [count.clone() for count in counts]
        self._graph, self._logits = captured(once, mask.device)
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)  # what the first run wrote behind the last token is written over

    @property
    def full(self) -> bool:
        """Whether no further token has room."""
        return self.tokens == self._capacity

    def token(self, tokens: Tensor) -> Tensor:
        """The logits that follow a further token of each row that goes on, (R, V) float32; ``tokens`` (R,) int64."""
        self._ids[self.rows, 0] = tokens
        self._graph.replay()
        self.tokens += 1
        return self._logits[self.rows]

    def keep(self, rows: Tensor) -> bool:
        """Goes on with some of the rows, (R',) int64 numbers of the present ones.

        Returns:
            Whether enough of the recorded rows go on for it to be worth its time.
        """
        self.rows = self.rows[rows]
        return 2 * len(self.rows) > len(self._ids)

    def given_back(self) -> tuple[DynamicCache, Tensor, Tensor]:
        """What an unrecorded step goes on with: cache, (R, tokens so far) mask, (..., R, 1) newest positions."""
        cache = caches.shortened(self._model, self._cache, self.rows, self.tokens)
        mask = self._real[self.rows, : self.tokens].long()
        return cache, mask, self._positions[..., self.rows, :] - 1
