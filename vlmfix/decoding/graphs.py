"""Records decoding steps as CUDA graphs: a step is then one launch, and its kernels do not wait for the host.

A step of a model of some billion parameters is hundreds of small kernels, which a host launches more slowly than the
GPU runs them. A recorded step reads and writes the same memory every time: tokens, positions, mask, the KV cache and
what edits know of the rows are in buffers, so that later calls of the same kind can replay it. Which steps are
recorded, and for how many rows and keys, follows from the call alone, so that an answer does not depend on the calls
before it. Rows that have ended stay in a recorded step until half of its rows have; the rest then continue in a smaller
one.

A step of which gradients are wanted is recorded with its autograd graph, and the backward pass through it as a second
CUDA graph, which is replayed for each gradient.

Shape letters (``docs/notation.md``): R rows that go on, G rows in the recorded step, H heads, K keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from vlmfix.attention.rows import Step
from vlmfix.attention.state import Plans, State, key_of
from vlmfix.decoding.newest import Recorder
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.cache import Arena
from vlmfix.upstream.compiling import quiet, settle
from vlmfix.upstream.wrappers import state_of

KEYS = 64
"""A recorded step's number of keys is a multiple of this, so that prompts of about the same length share one."""
ROOM = 256
"""Most new tokens that a recording has room for: a long answer takes memory as it grows."""
SHORT = 4
"""Answers of at most this many tokens are not recorded: recording a step costs about as much as three steps."""


class Replay(Protocol):
    """Runs a recording again."""

    def replay(self) -> None:
        """Runs the recorded kernels once more."""

    def pool(self) -> Any:  # noqa: ANN401 (torch gives it no type)
        """Returns the memory that the recording works in."""


def captured(once: Callable[[], Tensor], device: torch.device, after: Replay | None = None) -> tuple[Replay, Tensor]:
    """Runs a step once, and records it.

    Args:
        once: The step; it reads and writes the same memory whenever it is called.
        device: Where it runs.
        after: The recording that is always replayed before this one, and whose results it reads.

    Returns:
        The recording, and the tensor that each replay writes its result into.
    """
    settle()
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside), quiet():  # libraries' set-up at their first call must not be recorded
        once()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None if after is None else after.pool()):
        result = once()  # recorded, and not run
    return graph, result


def slots(rows: int) -> int:
    """Rounds a number of rows up to that of a recorded step: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    power = 1 << (rows - 1).bit_length()
    return 3 * power // 4 if power >= 4 and rows <= 3 * power // 4 else power


def capacity(tokens: int, room: int) -> int:
    """Computes the keys of a recorded step that follows ``tokens`` with room for ``room`` more, at most ``ROOM``."""
    return -(-(tokens + min(room, ROOM)) // KEYS) * KEYS


@dataclass(eq=False)
class Recordings:
    """Holds the steps that were recorded for one model, over one arena.

    Attributes:
        arena: Memory for keys and values.
        state: State of the model (``state_of``) when the steps were recorded.
        moved: ``arena.moved`` when they were recorded.
        made: Key of ``kind_of`` -> recording.
        fuses: Whether edits are compiled; False once the compiler has failed.
    """

    arena: Arena = field(default_factory=Arena)
    state: Hashable = None
    moved: int = 0
    made: dict[Hashable, Recorded] = field(default_factory=dict)
    fuses: bool = True

    def of(self, key: Hashable) -> Recorded | None:
        """Returns the recording for a key of ``kind_of``, or None without one over the present memory."""
        if self.moved != self.arena.moved:
            self.made.clear()
            self.moved = self.arena.moved
        return self.made.get(key)


_RECORDINGS: WeakKeyDictionary[nn.Module, Recordings] = WeakKeyDictionary()


def recordings_of(vlm: Checkpoint) -> Recordings:
    """Returns the model's recordings; drops them first when weights, adapters or hooks have changed since."""
    model = vlm.model
    state = state_of(model, vlm.family.decoder(model))
    found = _RECORDINGS.get(model)
    if found is None or found.state != state:
        forget(model)
        found = _RECORDINGS[model] = Recordings(state=state)
    return found


def forget(model: nn.Module) -> bool:
    """Frees the memory of a model's recordings and of its arena; returns whether there was any."""
    return _RECORDINGS.pop(model, None) is not None


class Recorded:
    """Records a decoding step for G rows and K keys, and replays it.

    Args:
        step: Calls the model, with (G, 1) tokens, (..., G, 1) positions, a (G, 1, 1, K) bool mask and a cache; returns
            its (G, V) float32 logits.
        recordings: The model's recordings, whose arena holds keys and values of all layers.
        plans: The edits at work, with what they know of the rows.
        mask: (R, tokens so far), 1 where a token is real.
        positions: (..., R, 1), those of the newest token.
        rows: G.
        keys: K.
        recorder: The edit that begins the step's autograd graph and keeps its nodes, for steps of which gradients are
            wanted; None for others.
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
        recorder: Recorder | None = None,
    ) -> None:
        device = mask.device
        self.capacity = keys
        self._state = State.like(plans, rows, keys)
        self._real = torch.ones(rows, keys, dtype=torch.bool, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = positions.new_zeros(*positions.shape[:-2], rows, 1)
        self._places = torch.arange(keys, device=device)  # an attribute, since the recording reads it
        self._nodes: dict[int, Tensor] = {}
        cache = recordings.arena.fixed(rows, keys, self._column)

        def once() -> Tensor:
            self._positions.add_(1)
            self._column.add_(1)
            visible = (self._real & (self._places <= self._column))[:, None, None]  # (G, 1, 1, K)
            with torch.no_grad():  # of which a recorder has its part taken out
                self._now = step(self._ids, self._positions, visible, cache)
            self._nodes = {} if recorder is None else dict(recorder.seen)
            return self._now

        def back() -> Tensor:
            nodes = [self._nodes[layer] for layer in sorted(self._nodes)]
            return torch.cat(torch.autograd.grad(self._now, nodes, self._slope, retain_graph=True), dim=1)

        self.begin(plans, mask, positions)  # the first run writes behind the last token, and is overwritten
        with self._state.standing_in(plans, fused=recordings.fuses and recorder is None):
            self._graph, self._logits = captured(once, device)
        if recorder is not None:
            self._slope = torch.zeros_like(self._logits)
            self._back, self._gradients = captured(back, device, self._graph)

    def begin(self, plans: Plans, mask: Tensor, positions: Tensor) -> None:
        """Loads the rows of a call, whose keys and values are in the arena.

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
        self._column.fill_(self.tokens - 1)  # that of the newest token
        self._positions.zero_()
        self._positions[..., :rows, :] = positions

    @property
    def steps(self) -> Mapping[int, tuple[Step, ...]]:
        """Returns, for each layer, the edits with what they know of the rows, as the newest step left it."""
        return self._state.steps

    @property
    def full(self) -> bool:
        """Returns whether there is no room for a further token."""
        return self.tokens == self.capacity

    def token(self, tokens: Tensor) -> Tensor:
        """Replays the step for a further token of each row, (R,) int64; returns the (R, V) float32 logits."""
        self._ids[self.rows, 0] = tokens
        self._graph.replay()
        self.tokens += 1
        return self._logits.detach()[self.rows]

    def with_nodes(self, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Replays the step as ``token`` does, for gradients of its logits until the next token.

        Args:
            tokens: (R,) int64.

        Returns:
            The (R, V) float32 logits, and for each layer of the recorder its weights (R, H, 1, K up to the newest
            token), on which the logits depend.
        """
        logits = self.token(tokens)
        nodes = {
            layer: node.detach()[self.rows][..., : self.tokens].requires_grad_()
            for layer, node in sorted(self._nodes.items())
        }
        with torch.enable_grad():
            return _Replayed.apply(self, logits, *nodes.values()), nodes

    def back(self, slope: Tensor, tokens: int) -> list[Tensor]:
        """Replays the backward pass through the newest step.

        Args:
            slope: (R, V) float32, gradients of something with respect to the logits.
            tokens: ``self.tokens`` when the logits were computed.

        Returns:
            Its gradient with respect to the weights of each layer of the recorder, (R, H, 1, tokens) each.
        """
        if tokens != self.tokens:
            raise RuntimeError("a later step has taken the place of the one that is asked about")
        self._slope.zero_()
        self._slope[self.rows] = slope
        self._back.replay()
        heads = [self._nodes[layer].shape[1] for layer in sorted(self._nodes)]
        return list(self._gradients[self.rows][..., :tokens].split(heads, dim=1))

    def give_back(self, plans: Plans) -> None:
        """Copies into the plans of the call what their edits have learned of keys in these steps."""
        self._state.give_back(plans, self.rows)

    def keep(self, rows: Tensor) -> bool:
        """Keeps some of the rows, (R',) int64 numbers of the present ones.

        Returns:
            Whether more than half of the recorded rows are still in use; with fewer, another step is cheaper.
        """
        self.rows = self.rows[rows]
        return 2 * len(self.rows) > len(self._ids)

    def given_back(self) -> tuple[Tensor, Tensor]:
        """Returns the state for an unrecorded step: (R, tokens so far) mask, and (..., R, 1) newest positions."""
        mask = self._real[self.rows, : self.tokens].long()
        return mask, self._positions[..., self.rows, :]


class _Replayed(torch.autograd.Function):
    """Stands in an autograd graph for a recorded step."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, logits: Tensor, *nodes: Tensor) -> Tensor:  # noqa: ANN401
        """Returns the step's logits."""
        ctx.recorded, ctx.tokens = recorded, recorded.tokens
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # noqa: ANN401
        """Returns gradients with respect to the nodes."""
        return None, None, *ctx.recorded.back(slope, ctx.tokens)


def kind_of(plans: Plans, positions: Tensor, rows: int, keys: int) -> Hashable:
    """Returns the key of the recording that serves a call; see ``Recorded``."""
    return key_of(plans), positions.shape[:-2], rows, keys
