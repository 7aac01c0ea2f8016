"""Reads what the output head makes of the newest token's residual stream at early layers, in the model's own passes.

Shape letters (``docs/notation.md``): R rows, V vocabulary; here also E exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream import names
from vlmfix.upstream.readout import read_out


@dataclass(frozen=True)
class Exit:
    """Names a place where the residual stream leaves for the output head.

    Attributes:
        after: Number of layers before it, from 0, which are the embeddings, to L.
        normed: Whether the last norm comes before the head, as it does behind the last layer.
    """

    after: int
    normed: bool


class Reader:
    """Reads the exits of passes that run inside ``listening``.

    Args:
        vlm: The model.
        exits: E exits.

    Attributes:
        exits: As given.
    """

    def __init__(self, vlm: Checkpoint, exits: Sequence[Exit]) -> None:
        self._model, self._decoder = vlm.model, vlm.family.decoder(vlm.model)
        self._layers, self.exits = vlm.family.layers(vlm.model), tuple(exits)
        self._states: dict[int, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keeps the last column's residual stream of each pass inside the block."""

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._states[0] = names.hidden(args, kwargs)[:, -1]

        def behind(number: int, output: Any) -> None:  # noqa: ANN401 (a tensor, or a tuple that has it)
            self._states[number] = (output if isinstance(output, Tensor) else output[0])[:, -1]

        with ExitStack() as hooks:
            for number in {place.after for place in self.exits}:
                if number == 0:
                    hooks.enter_context(self._layers[0].register_forward_pre_hook(before, with_kwargs=True))
                else:
                    hooks.enter_context(
                        self._layers[number - 1].register_forward_hook(
                            lambda layer, args, output, number=number: behind(number, output)
                        )
                    )
            yield

    def logits(self) -> Tensor:
        """Returns the logits of the newest pass at each exit, (R, E, V) float32."""
        found = [read_out(self._model, self._decoder, self._states[e.after], normed=e.normed) for e in self.exits]
        first = found[0].device  # layers may be on several
        return torch.stack([logits.to(first) for logits in found], dim=1)
