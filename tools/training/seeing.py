"""What the tower of the third embedded model learns alone: what stands in each cell of a picture, and in all of it."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tools.training.architecture import TextBatch
from tools.training.batches import TRAINING_SEED, Batches, mirror
from vlmfix.world.categories import CATEGORIES
from vlmfix.world.scenes import CANVAS, Scene, scene

NUMBER = {entry.name: number for number, entry in enumerate(CATEGORIES)}
FIRST, MORE = 1000, 10
"""Scenes that the first batch is drawn from, and how many more each step."""


def seen(view: Scene, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Tell what stands where.

    Args:
        view: The scene.
        cells: Rows and columns.

    Returns:
        (cells, cells) uint8, 0 for nothing and a category's number plus 1 for the foremost object that fills a third
        of the cell, or has a third of itself there; and (categories,) uint8, 1 for what is in the scene.
    """
    found = np.zeros((cells, cells), np.uint8)
    present = np.zeros(len(CATEGORIES), np.uint8)
    step = CANVAS // cells
    begin = np.arange(cells) * step
    for thing in view.objects:  # back to front
        x0, y0, x1, y1 = thing.box
        across = np.clip(np.minimum(x1, begin + step) - np.maximum(x0, begin), 0, None)  # (columns,)
        down = np.clip(np.minimum(y1, begin + step) - np.maximum(y0, begin), 0, None)  # (rows,)
        area = down[:, None] * across[None]
        number = NUMBER[thing.category]
        found[(3 * area > step * step) | (3 * area > (x1 - x0) * (y1 - y0))] = number + 1
        present[number] = 1
    return found, present


class Looks(Dataset[tuple[Tensor, Tensor, Tensor, Tensor, int]]):
    """Batches for the tower alone: scenes, whether mirrored, cells, what is present, and how many scenes are needed.

    Args:
        seed: Training seed.
        pool: How many scenes there are.
        rows: Scenes of a batch.
        cells: Rows and columns of the tower's cells.
        steps: How many batches there are.
    """

    def __init__(self, *, seed: int, pool: int, rows: int, cells: int, steps: int) -> None:
        self.seed, self.pool, self.rows, self.cells, self.steps = seed, pool, rows, cells, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        rng = random.Random(f"look/{self.seed}/{step}")
        reach = min(self.pool, FIRST + MORE * step)
        chosen = [int(rng.random() * reach) for _ in range(self.rows)]
        turned = [rng.random() < 0.5 for _ in range(self.rows)]
        cells, present = stacked(self.seed, chosen, turned, self.cells)
        return torch.tensor(chosen), torch.tensor(turned), cells, present, reach


class Talks(Dataset[tuple[TextBatch, Tensor]]):
    """Batches of questions and answers, each with what stands in the cells of its pictures.

    Args:
        batches: Without the cells.
        cells: Rows and columns of the tower's cells.
    """

    def __init__(self, batches: Batches, cells: int) -> None:
        self.batches, self.cells = batches, cells

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> tuple[TextBatch, Tensor]:
        batch = self.batches[step]
        cells, _ = stacked(self.batches.seed, batch.scenes.tolist(), batch.mirrored.tolist(), self.cells)
        return batch, cells


def stacked(seed: int, chosen: list[int], turned: list[bool], cells: int) -> tuple[Tensor, Tensor]:
    """Tell what stands in training scenes; see `seen`.

    Args:
        seed: Training seed.
        chosen: Indices of the scenes.
        turned: Whether each is mirrored.
        cells: Rows and columns.

    Returns:
        (B, cells, cells) and (B, categories) uint8.
    """
    views = [scene(TRAINING_SEED + seed, index) for index in chosen]
    found = [seen(mirror(view) if flip else view, cells) for view, flip in zip(views, turned, strict=True)]
    places, present = zip(*found, strict=True)
    return torch.from_numpy(np.stack(places)), torch.from_numpy(np.stack(present))
