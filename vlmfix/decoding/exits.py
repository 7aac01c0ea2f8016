"""Reads the residual stream in the model's own passes: of the newest token at early layers, or of a prompt's columns.

Shape letters (``docs/notation.md``): R rows, T prompt tokens, D hidden size, V vocabulary; here also E exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream import names
from vlmfix.upstream.readout import last_norm, read_out


@dataclass(frozen=True)
class Exit:
    """Names a place where the residual stream leaves for the output head.

    Attributes:
        after: Number of layers before it, from 0, which are the embeddings, to L.
        normed: Whether the last norm comes before the head, as it does behind the last layer.
    """

    after: int
    normed: bool

    @property
    def reads(self) -> frozenset[int]:
        """Returns behind how many layers the streams are that its logits are made of."""
        return frozenset({self.after})

    def logits(self, vlm: Checkpoint, streams: Mapping[int, Tensor]) -> Tensor:
        """Computes the logits of the newest tokens at this place, (R, V) float32.

        Args:
            vlm: The model, behind the pass.
            streams: (R, D) residual streams of the pass, by the number of layers before them.
        """
        decoder = vlm.family.decoder(vlm.model)
        return read_out(vlm.model, decoder, streams[self.after], normed=self.normed)


@contextmanager
def _streams(vlm: Checkpoint, places: Iterable[int], keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hands the (R, Q, D) streams behind some numbers of layers to ``keep``, in the passes inside the block."""
    layers = vlm.family.layers(vlm.model)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, names.hidden(args, kwargs))

    def behind(number: int, output: Any) -> None:  # noqa: ANN401 (a tensor, or a tuple that has it)
        keep(number, output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for number in set(places):
            if number == 0:
                hooks.enter_context(layers[0].register_forward_pre_hook(before, with_kwargs=True))
            else:
                hooks.enter_context(
                    layers[number - 1].register_forward_hook(
                        lambda layer, args, output, number=number: behind(number, output)
                    )
                )
        yield


class Reader:
    """Reads the exits of passes that run inside ``listening``.

    Args:
        vlm: The model.
        exits: E exits.

    Attributes:
        exits: As given.
    """

    def __init__(self, vlm: Checkpoint, exits: Sequence[Exit]) -> None:
        self._vlm, self.exits = vlm, tuple(exits)
        self._states: dict[int, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keeps the last column's residual stream of each pass inside the block."""

        def keep(number: int, states: Tensor) -> None:
            self._states[number] = states[:, -1]

        with _streams(self._vlm, frozenset[int]().union(*(place.reads for place in self.exits)), keep):
            yield

    def logits(self) -> Tensor:
        """Returns the logits of the newest pass at each exit, (R, E, V) float32."""
        found = [place.logits(self._vlm, self._states) for place in self.exits]
        first = found[0].device  # layers may be on several
        return torch.stack([logits.to(first) for logits in found], dim=1)


class Views:
    """Reads the residual stream of all columns of a prompt, whose pass runs whole inside ``listening``.

    Args:
        vlm: The model.
        exits: E exits; where one is normed, the stream behind the last norm is taken.
    """

    def __init__(self, vlm: Checkpoint, exits: Sequence[Exit]) -> None:
        self._vlm, self._exits = vlm, tuple(exits)
        self._states: dict[int, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keeps the residual stream of the pass inside the block."""
        with _streams(self._vlm, (place.after for place in self._exits), self._states.__setitem__):
            yield

    def take(self, rows: int) -> Tensor:
        """Returns the states of the first rows, (E, rows, T, D), and forgets them."""
        decoder, device = self._vlm.family.decoder(self._vlm.model), self._vlm.device
        found = [self._states[place.after][:rows] for place in self._exits]
        normed = [
            last_norm(decoder)(state) if place.normed else state
            for place, state in zip(self._exits, found, strict=True)
        ]
        self._states.clear()
        return torch.stack([state.to(device) for state in normed])
