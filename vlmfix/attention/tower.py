"""Reads how much attention each token of the vision tower gets, while the tower runs, and edits the tower's stream.

Of attention it keeps only sums over rows, and computes a few rows at a time: never the whole (N, N) of a layer.

Shape letters (``docs/notation.md``): H heads and D head dimension, here of the tower; here also V views (pictures,
tiles or windows that run side by side) and N tokens of each, the class token included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmfix.errors import UnsupportedAttentionError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.turns import turn_of
from vlmfix.upstream.attention import register, sdpa, switched

NAME = "vlmfix_tower"
"""Name of the attention function in transformers' registries."""
READINGS = "_vlmfix_readings"
"""Attribute of an attention module that holds its readings."""
EDITS = "_vlmfix_tower_edits"
"""Attribute of an MLP of the tower that holds its layer's number and the edits of what it adds to the stream."""
ROOM = 2**25
"""Most attention weights that are held at once."""

TowerRows = Literal["class", "patches"]


@dataclass(eq=False)
class TowerReading:
    """Sums the attention that each token of the vision tower gets in one layer, over heads and some rows.

    Attributes:
        layer: Layer of the tower; negative numbers count from the end.
        rows: The row of the class token, or those of all patches.
        classes: Tokens before the patches, the class token first; 0 where there is none.
        sums: (V, N) float32 for every call of the layer's attention; NaN before the patches.
    """

    layer: int
    rows: TowerRows
    classes: int
    sums: list[Tensor] = field(default_factory=list)

    def read(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """Appends the sums of one call.

        Args:
            query: (V, H, N, D), rotated where the tower does that.
            key: (V, H, N, D).
            mask: (V, 1, N, N) bool, True where a query may look, or None for everywhere.
            scale: Factor on the scores.
        """
        self.sums.append(_without_classes(self._summed(query, key, mask, scale), self.classes))

    def _summed(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if self.rows == "class":
            return summed_rows(query[:, :, :1], key, mask if mask is None else mask[:, :, :1], scale)
        views, heads, length, _ = query.shape
        step, key = max(1, ROOM // (views * heads * length)), key.float()  # once for all rows
        total = torch.zeros(views, length, device=query.device)
        for start in range(self.classes, length, step):
            rows = slice(start, start + step)
            total += summed_rows(query[:, :, rows], key, mask if mask is None else mask[:, :, rows], scale)
        return total


def summed_rows(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Sums attention weights over heads and rows.

    Args:
        query: (V, H, R, D), the rows.
        key: (V, H, N, D).
        mask: (V, 1, R, N) bool, True where a query may look, or None for everywhere.
        scale: Factor on the scores.

    Returns:
        (V, N) float32.
    """
    scores = query.float() @ key.float().transpose(2, 3) * scale  # (V, H, R, N)
    if mask is not None:
        scores = scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).sum(dim=(1, 2))


def _without_classes(sums: Tensor, classes: int) -> Tensor:
    return torch.cat([sums.new_full((len(sums), classes), torch.nan), sums[:, classes:]], dim=1)  # (V, N)


def tower_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes SDPA, and shows query and key to the module's readings.

    Args:
        module: Attention module of a vision tower.
        query: (V, H, N, D).
        key: (V, H, N, D).
        value: (V, H, N, D).
        attention_mask: (V, 1, N, N) bool, or None.
        scaling: Factor on the scores; None is 1 / sqrt(D).
        dropout: Passed to SDPA.
        **kwargs: Passed to SDPA.

    Returns:
        (V, N, H, D) head outputs, and None for the weights.
    """
    readings: Sequence[TowerReading] = getattr(module, READINGS, ())
    for reading in readings:
        reading.read(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs), None


@contextmanager
def tower_read(vlm: Checkpoint, readings: Sequence[TowerReading]) -> Iterator[None]:
    """Lets readings see the attention of the vision tower's passes inside the block, without changing its outputs.

    Blocks nest: the outer block's readings go on reading.

    Args:
        vlm: The model; its implementation of attention is restored on leaving, also after an exception.
        readings: What to read; filled by the passes.

    Raises:
        UnsupportedAttentionError: The tower has no such layer.
    """
    register(NAME, tower_attention)
    modules = vlm.family.tower_attention(vlm.model)
    count = len(modules)
    if absent := [reading.layer for reading in readings if not -count <= reading.layer < count]:
        raise UnsupportedAttentionError(f"the vision tower has {count} layers, and no layer {absent[0]}")
    read = {reading.layer % count: modules[reading.layer] for reading in readings}
    former = {number: getattr(module, READINGS, ()) for number, module in read.items()}
    tower = vlm.family.tower(vlm.model)
    with turn_of(vlm.model).guarded(tower), switched([tower, *modules], NAME):
        try:
            for reading in readings:
                module = modules[reading.layer]
                setattr(module, READINGS, (*getattr(module, READINGS, ()), reading))
            yield
        finally:
            for number, module in read.items():
                setattr(module, READINGS, former[number]) if former[number] else delattr(module, READINGS)


class TowerEdit(ABC):
    """Rewrites what each layer's MLP in the vision tower adds to the stream of the picture's tokens."""

    @abstractmethod
    def stream(self, layer: int, stream: Tensor) -> Tensor:
        """Returns new values, in any precision.

        Args:
            layer: Number of the layer, from 0.
            stream: (V, N, D), or (N, D) where the tower lays the patches of all pictures one behind the other; D is the
                tower's hidden size.
        """


@contextmanager
def tower_edited(vlm: Checkpoint, edits: Sequence[TowerEdit]) -> Iterator[None]:
    """Applies edits to every picture that the vision tower encodes inside the block.

    Blocks nest: the inner block's edits act after the outer's. Other threads that use the model wait.

    Args:
        vlm: The model; it is left as it was found, also after an exception.
        edits: The edits, in order. With none, the model is not touched.

    Raises:
        UnsupportedAttentionError: A layer of the tower has no MLP under a known name.
    """
    if not edits:
        yield
        return
    mlps = tower_mlps(vlm)
    former = [getattr(mlp, EDITS, None) for mlp in mlps]
    with turn_of(vlm.model).guarded(vlm.family.tower(vlm.model)), ExitStack() as hooks:
        try:
            for layer, (mlp, before) in enumerate(zip(mlps, former, strict=True)):
                setattr(mlp, EDITS, (layer, (*(() if before is None else before[1]), *edits)))
                if before is None:  # an outer block's hook applies all edits
                    hooks.enter_context(mlp.register_forward_hook(_edit))
            yield
        finally:
            _restore(mlps, former)


@contextmanager
def tower_bare(vlm: Checkpoint) -> Iterator[None]:
    """Lifts every edit of the vision tower inside the block."""
    mlps = [module for module in vlm.family.tower(vlm.model).modules() if hasattr(module, EDITS)]
    former = [getattr(mlp, EDITS) for mlp in mlps]
    try:
        for mlp in mlps:
            delattr(mlp, EDITS)
        yield
    finally:
        _restore(mlps, former)


def tower_mlps(vlm: Checkpoint) -> list[nn.Module]:
    """Returns the MLPs of the vision tower, in layer order.

    Raises:
        UnsupportedAttentionError: A layer has none under a known name.
    """
    return [layer.get_submodule("mlp") for layer in tower_layers(vlm)]


def tower_layers(vlm: Checkpoint) -> list[nn.Module]:
    """Returns the layers of the vision tower in order; each has ``mlp``.

    Raises:
        UnsupportedAttentionError: A layer has no MLP under a known name.
    """
    attention = {id(module) for module in vlm.family.tower_attention(vlm.model)}
    found = []
    for module in vlm.family.tower(vlm.model).modules():
        children = dict(module.named_children())
        if "mlp" in children and any(id(child) in attention for child in children.values()):
            found.append(module)
    if len(found) != len(attention):
        raise UnsupportedAttentionError(
            f"{len(attention) - len(found)} layers of the vision tower have no mlp", "leave the tower as it is"
        )
    return found


def _edit(mlp: nn.Module, args: object, output: Tensor) -> Tensor:
    layer, edits = getattr(mlp, EDITS, (0, ()))  # none while they are lifted
    for edit in edits:
        output = edit.stream(layer, output).to(output.dtype)
    return output


def _restore(mlps: Sequence[nn.Module], former: Sequence[object]) -> None:
    for mlp, before in zip(mlps, former, strict=True):
        delattr(mlp, EDITS) if before is None else setattr(mlp, EDITS, before)
