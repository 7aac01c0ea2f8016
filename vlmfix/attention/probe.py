"""Probes attention: shows rows of weights, head outputs and states, and gates heads off.

The kernel computes the rows that readings ask for and no others: memory grows with K and not with K squared. Shape
letters (``docs/notation.md``): B rows, H query heads, G key/value heads, R query rows, K keys, D head dimension,
L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmfix.attention.edit import OutputEdit, PromptReading, Rows, Site
from vlmfix.models.checkpoint import Checkpoint

Reader = Callable[[Site, Tensor], None]
"""Function that a probe calls with a site and a tensor; it must not write into the tensor."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TextRows(PromptReading):
    """Shows the attention of the prompt text behind a picture.

    ``site.acts`` marks this probe's rows; other readings may have asked for further ones.

    Attributes:
        reader: Called with (B, H, R, K) float32 weights, once per layer.
    """

    reader: Reader

    def read(self, site: Site, weights: Tensor) -> None:
        """Passes the weights to the reader."""
        self.reader(site, weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class TextRowsAndStates(TextRows):
    """Shows the attention of the prompt text, and as ``site.hidden`` the residual stream that enters the layer."""

    needs_hidden: ClassVar[bool] = True


@dataclass(frozen=True, eq=False, kw_only=True)
class LastRows(TextRows):
    """Shows the attention of the last prompt row and of every row behind it, in order; ``site.acts`` marks them."""

    rows: ClassVar[Rows] = "last"


@dataclass(frozen=True, eq=False, kw_only=True)
class LastOutputs(OutputEdit):
    """Shows the head outputs of the last row.

    Attributes:
        reader: Called with (B, H, D) outputs before the output projection, once per layer.
    """

    reader: Reader
    rows: ClassVar[Rows] = "last"

    def output(self, site: Site, output: Tensor) -> Tensor:
        """Shows the last row's outputs; returns all."""
        self.reader(site, output[:, -1])  # (B, H, D)
        return output


@dataclass(frozen=True, eq=False, kw_only=True)
class Gates(OutputEdit):
    """Multiplies each head's output in the last row by its gate: 1 leaves a head, 0 switches it off.

    Attributes:
        gates: (L, B, H) float.
    """

    gates: Tensor
    rows: ClassVar[Rows] = "last"

    def output(self, site: Site, output: Tensor) -> Tensor:
        """Returns the gated outputs, (B, R, H, D)."""
        return output * self.gates[site.layer][:, None, :, None].to(output.dtype)


def mass(weights: Tensor, keys: Tensor) -> Tensor:
    """Sums the attention that goes to some keys.

    Args:
        weights: (B, H, R, K) attention.
        keys: (B, K) bool.

    Returns:
        (B, H, R), in [0, 1].
    """
    return torch.einsum("bhrk,bk->bhr", weights, keys.to(weights.dtype))


def mean_of_rows(values: Tensor, acts: Tensor) -> Tensor:
    """Averages values over the rows that ``acts`` marks; NaN for a sample without any.

    Args:
        values: (B, H, R, ...).
        acts: (B, R) bool.

    Returns:
        (B, H, ...).
    """
    share = acts.to(values.dtype) / acts.sum(dim=1, keepdim=True)  # (B, R)
    return torch.einsum("bhr...,br->bh...", values, share)


@contextmanager
def leaving(vlm: Checkpoint, reader: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Shows the residual stream that leaves each layer.

    Args:
        vlm: The model.
        reader: Called with the layer's number and (B, T, hidden size).
    """
    layers = vlm.family.layers(vlm.model)
    numbers = {layer: number for number, layer in enumerate(layers)}

    def show(layer: nn.Module, args: object, output: Any) -> None:  # noqa: ANN401 (a tensor, or a tuple that has it)
        reader(numbers[layer], output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(show))
        yield


class Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a pass behind the last layer that somebody reads."""


@contextmanager
def ending_at(vlm: Checkpoint, layer: int) -> Iterator[None]:
    """Ends every pass inside the block with ``Enough`` when a layer's attention is computed; nothing behind it is run.

    Args:
        vlm: The model.
        layer: Number of the layer.
    """

    def end(module: nn.Module, args: object, output: object) -> None:
        raise Enough

    with vlm.family.attention_modules(vlm.model)[layer].register_forward_hook(end):
        yield
