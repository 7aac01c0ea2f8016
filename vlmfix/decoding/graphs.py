"""Steps recorded as CUDA graphs: a step is then one launch, and no longer waits for the host between its kernels.

A step of a model of some billion parameters is hundreds of small kernels, which a host launches more slowly than the
GPU runs them. A recorded step reads and writes the same memory every time: tokens, positions, mask, the cache and what
edits know of the rows stand in buffers, so that later calls of the same kind use it as it is. Which steps are recorded,
and for how many rows and keys, follows from the call alone, so that an answer does not depend on the calls before it.
Rows that have ended stay in a recorded step until half of them have; the rest then goes on in a smaller one.

Shape letters (``docs/notation.md``): R rows that go on, G rows in the recorded step, K keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from vlmfix.attention.state import Plans, State, key_of
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.cache import Arena
from vlmfix.upstream.compiling import quiet
from vlmfix.upstream.wrappers import state_of

KEYS = 64
"""Recorded steps see a multiple of so many keys, so that prompts of about the same length share one."""
ROOM = 256
"""Most tokens that a recording has room for: memory for a long answer is taken as it grows."""
SHORT = 4
"""Answers of at most so many tokens are not recorded: recording a step costs about as much as three of them."""


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
    with torch.cuda.stream(aside), quiet():  # what libraries set up at their first call must not be recorded
        once()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = once()  # recorded, and not run
    return graph, result


def slots(rows: int) -> int:
    """Rows of the recorded step that so many rows pass in: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    power = 1 << (rows - 1).bit_length()
    return 3 * power // 4 if power >= 4 and rows <= 3 * power // 4 else power


def capacity(tokens: int, room: int) -> int:
    """Keys of the recorded step that goes on behind so many tokens, with room for so many, ``ROOM`` at most."""
    return -(-(tokens + min(room, ROOM)) // KEYS) * KEYS


@dataclass(eq=False)
class Recordings:
    """The steps that were recorded for one model, over one arena.

    Attributes:
        arena: Memory for keys and values.
        state: What the model was when they were made.
        moved: ``arena.moved`` then.
        made: The recordings.
    """

    arena: Arena = field(default_factory=Arena)
    state: Hashable = None
    moved: int = 0
    made: dict[Hashable, Recorded] = field(default_factory=dict)

    def of(self, key: Hashable) -> Recorded | None:
        """The recording of a kind, if there is one over the present memory."""
        if self.moved != self.arena.moved:
            self.made.clear()
            self.moved = self.arena.moved
        return self.made.get(key)


_RECORDINGS: WeakKeyDictionary[nn.Module, Recordings] = WeakKeyDictionary()


def recordings_of(vlm: Checkpoint) -> Recordings:
    """The recordings of a model as it is: none when weights, adapters or hooks have changed since."""
    model = vlm.model
    state = state_of(model, vlm.family.decoder(model))
    found = _RECORDINGS.get(model)
    if found is None or found.state != state:
        forget(model)
        found = _RECORDINGS[model] = Recordings(state=state)
    return found


def forget(model: nn.Module) -> bool:
    """Gives back the memory of a model's recordings and of its arena; says whether there was any."""
    return _RECORDINGS.pop(model, None) is not None


class Recorded:
    """A step recorded for G rows and K keys.

    Args:
        step: Calls the model, with (G, 1) tokens, (..., G, 1) positions, a (G, 1, 1, K) bool mask and a cache; returns
            its (G, V) float32 logits.
        recordings: Where it is kept; its arena holds keys and values of all layers.
        plans: The edits at work, which know their rows.
        mask: (R, tokens so far), 1 where a token is real.
        positions: (..., R, 1), those of the newest token.
        rows: G.
        keys: K.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, Tensor, Cache], Tensor],
        recordings: Recordings,
        plans: Plans,
        mask: Tensor,
        positions: Tensor,
        rows: int,
        keys: int,
    ) -> None:
        device = mask.device
        self.capacity = keys
        self._state = State.like(plans, rows, keys)
        self._real = torch.ones(rows, keys, dtype=torch.bool, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = positions.new_zeros(*positions.shape[:-2], rows, 1)
        self._places = torch.arange(keys, device=device)  # kept, as all that the recording reads
        cache = recordings.arena.fixed(rows, keys, self._column)

        def once() -> Tensor:
            visible = (self._real & (self._places <= self._column))[:, None, None]  # (G, 1, 1, K)
            logits = step(self._ids, self._positions, visible, cache)
            self._positions.add_(1)
            self._column.add_(1)
            return logits

        self.begin(plans, mask, positions)  # what the first run writes behind the last token is written over
        with self._state.standing_in(plans):
            self._graph, self._logits = captured(once, device)

    def begin(self, plans: Plans, mask: Tensor, positions: Tensor) -> None:
        """Takes over the rows of a call, whose keys and values stand in the arena.

        Args:
            plans: The edits at work.
            mask: (R, tokens so far), 1 where a token is real.
            positions: (..., R, 1), those of the newest token.
        """
        rows, self.tokens = mask.shape
        self.rows = torch.arange(rows, device=mask.device)
        self._state.load(plans)
        self._real.fill_(True)
        self._real[:rows, : self.tokens] = mask.bool()
        self._column.fill_(self.tokens)
        self._positions.zero_()
        self._positions[..., :rows, :] = positions + 1

    @property
    def full(self) -> bool:
        """Whether no further token has room."""
        return self.tokens == self.capacity

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

    def given_back(self) -> tuple[Tensor, Tensor]:
        """What an unrecorded step goes on with: (R, tokens so far) mask, and (..., R, 1) newest positions."""
        mask = self._real[self.rows, : self.tokens].long()
        return mask, self._positions[..., self.rows, :] - 1


def kind_of(plans: Plans, positions: Tensor, rows: int, keys: int) -> Hashable:
    """Says which recording serves a call; see ``Recorded``."""
    return key_of(plans), positions.shape[:-2], rows, keys
