"""Localization heads: heads that look at one compact place of the picture.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads; here also N tokens of a picture,
C cells of a map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Site
from vlmfix.attention.probe import LastRows
from vlmfix.attention.session import edited
from vlmfix.errors import LayoutError
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import ImageLayout

CELLS = 24
"""Lines and columns of the map over which the tokens of a tiled picture are painted."""
NEIGHBOURS = np.ones((3, 3), dtype=int)
"""Cells touch by edges and by corners."""


@dataclass(frozen=True, kw_only=True)
class Localization(Profiler):
    """How often a head is among those that look at the picture in the most compact way.

        mass  = image attention of the last row
        H_s   = - sum over connected components i of p_i log p_i,   p_i = |C_i| / sum |C|
        score = share of pictures in which the head is among the ``selected`` of lowest H_s with mass >= tau

    Components are those of the cells above the map's mean, joined by edges or corners; a map without such a cell has
    infinite entropy and is never selected. Of equal entropies the head with more mass goes first.

    Source: Kang et al., "Your Large Vision-Language Model Only Needs A Few Attention Heads For Visual Grounding", CVPR
    2025, arXiv 2503.06287. *Differs*: the paper's thousand referring expressions are whatever pictures and question
    are given; tau is found on the first ``warm_up`` pictures, where the sorted curve of mean mass is farthest from its
    chord; a picture in tiles is painted over 24 x 24 cells. The released code, which weighs components by their
    attention and compares heads' indices instead of their mass, is not followed. *Cost*: one row of the shared pass.

    Args:
        selected: Heads selected per picture, at least 1.
        first_layer: Lowest layer whose heads can be selected; the paper leaves out the first two.
        min_mass: tau, in [0, 1]; None finds it (the paper has 0.24 for LLaVA-1.5-7B).
        warm_up: Pictures that tau is found on.
    """

    name: ClassVar[str] = "localization"
    title: ClassVar[str] = "share of pictures with a compact look"

    selected: int = 10
    first_layer: int = 2
    min_mass: float | None = None
    warm_up: int = 32

    def __post_init__(self) -> None:
        self._require(self.selected >= 1, "selected", "at least 1")
        self._require(self.first_layer >= 0, "first_layer", "at least 0")
        self._require(self.min_mass is None or 0 <= self.min_mass <= 1, "min_mass", "in [0, 1]")
        self._require(self.warm_up >= 1, "warm_up", "at least 1")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self)


class _State(State):
    def __init__(self, profiler: Localization) -> None:
        self._profiler = profiler
        self._threshold = profiler.min_mass
        self._held: list[Tensor] = []
        self._mass: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}
        self._maps: list[_Map] = []

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        self._maps = [_Map.of(work.layout, row) for row in range(work.batch.rows)]
        layers = LayerSet(f"{self._profiler.first_layer}:")
        with edited(work.vlm, work.layout, [LastRows(reader=self._read, layers=layers)]):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        last = weights[:, :, -1].cpu()  # (B, H, K)
        tokens = [part.tokens for part in self._maps]
        values = [last[row][:, columns] for row, columns in enumerate(tokens)]  # each (H, N)
        self._mass[site.layer] = torch.stack([part.sum(dim=1) for part in values])  # (B, H)
        painted = [layout.painted(part) for layout, part in zip(self._maps, values, strict=True)]
        self._entropy[site.layer] = torch.stack([spatial_entropy(part) for part in painted])  # (B, H)

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        empty = torch.zeros(work.batch.rows, work.heads)
        never = torch.full_like(empty, torch.inf)  # layers below the first have no entropy and are never selected
        mass = torch.stack([self._mass.get(layer, empty) for layer in range(work.layers)], dim=1)  # (B, L, H)
        entropy = torch.stack([self._entropy.get(layer, never) for layer in range(work.layers)], dim=1)
        self._held += torch.stack([mass, entropy], dim=1).unbind()  # each (2, L, H)
        if self._threshold is None and len(self._held) < self._profiler.warm_up:
            return torch.empty(0, work.layers, work.heads)
        return self.rest(work.layers, work.heads)

    def rest(self, layers: int, heads: int) -> Tensor:
        if not self._held:
            return torch.empty(0, layers, heads)
        held = torch.stack(self._held)  # (N, 2, L, H)
        self._held = []
        if self._threshold is None:
            self._threshold = elbow(held[:, 0, self._profiler.first_layer :].mean(dim=0).flatten())
        return torch.stack(
            [selected(part[0], part[1], self._threshold, self._profiler.selected) for part in held]
        )  # (N, L, H)

    def details(self) -> dict[str, Tensor]:
        return {} if self._threshold is None else {"min_mass": torch.tensor([self._threshold])}


@dataclass(frozen=True, eq=False)
class _Map:
    """How the tokens of a row's picture lie in the picture.

    Attributes:
        tokens: (N,) int64, their columns.
        size: Lines and columns of the map.
        shows: (C, N) share of each token in each cell; None when tokens and cells are the same.
    """

    tokens: Tensor
    size: tuple[int, int]
    shows: Tensor | None

    @classmethod
    def of(cls, layout: ImageLayout, row: int) -> _Map:
        tokens = (layout.image[row] == 0).nonzero().squeeze(1).cpu()
        grid = layout.grid(row, 0)
        if grid is not None:
            return cls(tokens, grid, None)
        boxes = layout.boxes[row].cpu()[tokens]  # (N, 4)
        middle = (torch.arange(CELLS) + 0.5) / CELLS
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        x, y = x.flatten()[:, None], y.flatten()[:, None]  # (C, 1)
        x0, y0, x1, y1 = boxes.unbind(dim=1)
        inside = ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).float()  # (C, N)
        if not bool(inside.any()):
            raise LayoutError(
                f"the tokens of row {row} have no place in their picture", "encode with vlm.encode(prompts, pictures)"
            )
        return cls(tokens, (CELLS, CELLS), inside / inside.sum(dim=1, keepdim=True).clamp(min=1))

    def painted(self, values: Tensor) -> Tensor:
        """(H, N) values of the tokens as (H, lines, columns)."""
        cells = values if self.shows is None else values @ self.shows.T  # (H, C)
        return cells.view(-1, *self.size)


def spatial_entropy(maps: Tensor) -> Tensor:
    """Entropy of the sizes of a map's bright parts.

    Args:
        maps: (H, lines, columns), on the CPU.

    Returns:
        (H,), 0 for one part, log 2 for two equal ones, infinite for a map of one value.
    """
    bright = (maps > maps.mean(dim=(1, 2), keepdim=True)).numpy()
    return torch.tensor([_entropy(part) for part in bright], dtype=torch.float32)


def _entropy(bright: np.ndarray) -> float:
    parts, count = ndimage.label(bright, structure=NEIGHBOURS)
    if count == 0:
        return float("inf")
    share = np.bincount(parts.ravel())[1:] / bright.sum()
    return float(-(share * np.log(share)).sum())


def elbow(values: Tensor) -> float:
    """Where the sorted curve of some values bends most: where it is farthest from the chord between its ends.

    Args:
        values: (n,), at least one.

    Returns:
        The middle between the two values that the bend parts.
    """
    curve = values.sort().values.double()
    chord = torch.linspace(float(curve[0]), float(curve[-1]), len(curve), dtype=torch.float64)
    bend = int((chord - curve).abs().argmax())
    other = bend + 1 if curve[bend] < chord[bend] else bend - 1
    return float(curve[[bend, min(max(other, 0), len(curve) - 1)]].mean())


def selected(mass: Tensor, entropy: Tensor, threshold: float, count: int) -> Tensor:
    """Which heads one picture selects.

    Args:
        mass: (L, H) image attention.
        entropy: (L, H) spatial entropy, infinite for heads that cannot be selected.
        threshold: tau.
        count: How many; fewer when fewer qualify.

    Returns:
        (L, H) float32, 1 for selected heads.
    """
    qualified = (mass >= threshold) & entropy.isfinite()
    rank = torch.where(qualified, entropy, torch.inf).flatten()
    order = torch.from_numpy(np.lexsort((-mass.flatten().numpy(), rank.numpy())))
    chosen = order[: min(count, int(qualified.sum()))]
    return torch.zeros(rank.shape).index_fill(0, chosen, 1.0).view_as(mass)
