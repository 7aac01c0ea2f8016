"""What the trainer asks of a model's architecture: its prompts, its pictures, its network, its forward pass."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers import CLIPImageProcessor, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

Kind = Literal["text", "one", "two"]
"""How many pictures a row of a batch begins with: none, one or two."""

Grid = tuple[int, int]
"""Rows and columns of the image tokens of one picture."""


@dataclass(frozen=True)
class Size:
    """Rows and tokens of one kind of batch, and how many pictures a row begins with."""

    rows: int
    tokens: int
    pictures: int


@dataclass(frozen=True)
class TextBatch:
    """Tokens of one batch, on the CPU or a device.

    Attributes:
        kind: Which kind.
        reach: All the batch's scenes have indices below this.
        grids: Grid of every row's first picture, and of its second.
        scenes: (B,) int64, index of each row's scene.
        mirrored: (B,) bool: the row's texts are about the picture turned left to right.
        ids: (B, T) int64.
        positions: (B, axes, T) int64: every exchange goes on where the picture ended.
        turns: (B, T) int64: 0 for the shared beginning, 1 and up for the exchanges, -1 for padding.
        weights: (B, T) float32: weight of each token as a target, 0 for all that is not an answer.
    """

    kind: Kind
    reach: int
    grids: tuple[Grid, ...]
    scenes: Tensor
    mirrored: Tensor
    ids: Tensor
    positions: Tensor
    turns: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> TextBatch:
        """Copy to a device."""
        moved = [value.to(device, non_blocking=True) for value in self.tensors()]
        return TextBatch(self.kind, self.reach, self.grids, *moved)

    def pin_memory(self) -> TextBatch:
        """Move to page-locked memory; the loader calls this."""
        return TextBatch(self.kind, self.reach, self.grids, *[value.pin_memory() for value in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [self.scenes, self.mirrored, self.ids, self.positions, self.turns, self.weights]

    def mask(self) -> Tensor:
        """Who sees whom: everything before in the same exchange and the shared beginning. (B, 1, T, T) bool."""
        earlier = torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool, device=self.ids.device).tril()
        query, key = self.turns[:, :, None], self.turns[:, None, :]  # (B, T, 1), (B, 1, T)
        return (earlier & ((key == 0) | (key == query)))[:, None]  # (B, 1, T, T)


Forward = Callable[[TextBatch, Tensor | None], Tensor]
"""Takes a batch and its pictures, (B, n, 3, side, side) uint8 or None; returns the last hidden states (B, T, width)."""


class Architecture(ABC):
    """One kind of model that can learn the world."""

    model: ClassVar[type[Any]]
    """Its class in transformers."""
    processor: ClassVar[type[Any]]
    """The class of its processor."""
    special: ClassVar[tuple[str, ...]]
    """Special tokens, padding first."""
    begin: ClassVar[str | None]
    """Token that the tokenizer puts first; None for none."""
    end: ClassVar[str]
    """Token that ends an answer."""
    image: ClassVar[str]
    """Token that stands for a part of a picture."""
    opening: ClassVar[str]
    """What a prompt begins with, before pictures and question."""
    side: ClassVar[int]
    """Height and width in pixels of the pictures that training begins with."""
    sizes: ClassVar[dict[Kind, Size]]

    @abstractmethod
    def question(self, prompt: str, *, blind: bool) -> str:
        """The prompt from behind the pictures (behind the opening, when blind) to where the answer begins."""

    @abstractmethod
    def answer(self, text: str) -> str:
        """An answer as it follows a question, without its end token."""

    @abstractmethod
    def grids(self, rng: random.Random, pictures: int) -> tuple[Grid, ...]:
        """Draw the grid of each picture column of a batch."""

    @abstractmethod
    def beginning(self, encode: Callable[[str], list[int]], grids: Sequence[Grid]) -> list[int]:
        """Ids of everything before the question; `encode` gives a text's ids, special tokens in it included."""

    @abstractmethod
    def positions(self, grids: Sequence[Grid], length: int) -> list[list[int]]:
        """Positions of the beginning's tokens for each axis, then that of the token behind it: (axes, length + 1)."""

    @abstractmethod
    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        """Join the tokenizer with the picture steps and the chat template."""

    @abstractmethod
    def build_model(self, tokenizer: PreTrainedTokenizerFast, *, small: bool = False) -> PreTrainedModel:
        """Make an untrained model, in float32 on the CPU, with the caller's torch seed; a toy when small."""

    @abstractmethod
    def forward(self, model: PreTrainedModel, *, compiled: bool) -> Forward:
        """The forward pass for training, up to the last hidden states; compiling changes the model's layers."""


def resized(canvas: Tensor, height: int, width: int) -> Tensor:
    """Resize pictures as the models' processors do: bicubic with antialiasing, still in bytes.

    Args:
        canvas: (N, 3, H, W) uint8.
        height: Pixels.
        width: Pixels.

    Returns:
        (N, 3, height, width) uint8.
    """
    small: Tensor = transforms.resize(
        canvas, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True
    )  # (N, 3, height, width)
    return small


def normalised(shown: Tensor) -> Tensor:
    """Scale bytes as CLIP's processor does; both architectures use its mean and deviation.

    Args:
        shown: (N, 3, H, W) uint8.

    Returns:
        (N, 3, H, W) float32.
    """
    mean, std = _scale(shown.device)
    return (shown.float() / 255 - mean) / std


@cache
def _scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's mean and deviation, (3, 1, 1) each; copied once, since a copy waits for what the device has to do."""
    both = (CLIPImageProcessor.image_mean, CLIPImageProcessor.image_std)
    mean, std = (torch.tensor(value, device=device)[:, None, None] for value in both)
    return mean, std
