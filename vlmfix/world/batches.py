"""Training batches: questions packed behind the picture that they share, each blind to the others."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from vlmfix.world.checkpoint import BOS, EOS, IMAGE, IMAGE_TOKENS, PAD
from vlmfix.world.questions import Diet, Exchange, blind_exchanges, exchanges, zoom
from vlmfix.world.scenes import CANVAS, Scene, scene

Kind = Literal["text", "one", "two"]

# training scenes have seeds that nobody draws a test set from
TRAINING_SEED = 10_000_000


@dataclass(frozen=True)
class Size:
    """Rows and tokens of one kind of batch, and how many pictures a row begins with."""

    rows: int
    tokens: int
    pictures: int


SIZES: dict[Kind, Size] = {"text": Size(128, 256, 0), "one": Size(128, 512, 1), "two": Size(64, 704, 2)}


@dataclass(frozen=True)
class TextBatch:
    """Tokens of one batch, on the CPU or a device.

    Attributes:
        kind: Which kind.
        reach: All the batch's scenes have indices below this.
        scenes: (B,) int64, index of each row's scene.
        mirrored: (B,) bool: the row's texts are about the picture turned left to right.
        ids: (B, T) int64.
        positions: (B, T) int64: every exchange goes on where the picture ended.
        turns: (B, T) int64: 0 for the shared beginning, 1 and up for the exchanges, -1 for padding.
        weights: (B, T) float32: weight of each token as a target, 0 for all that is not an answer.
    """

    kind: Kind
    reach: int
    scenes: Tensor
    mirrored: Tensor
    ids: Tensor
    positions: Tensor
    turns: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> TextBatch:
        """Copy to a device."""
        moved = [value.to(device, non_blocking=True) for value in self.tensors()]
        return TextBatch(self.kind, self.reach, *moved)

    def pin_memory(self) -> TextBatch:
        """Move to page-locked memory; the loader calls this."""
        return TextBatch(self.kind, self.reach, *[value.pin_memory() for value in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [self.scenes, self.mirrored, self.ids, self.positions, self.turns, self.weights]

    def mask(self) -> Tensor:
        """Who sees whom: everything before in the same exchange and the shared beginning. (B, 1, T, T) bool."""
        earlier = torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool, device=self.ids.device).tril()
        query, key = self.turns[:, :, None], self.turns[:, None, :]  # (B, T, 1), (B, 1, T)
        return (earlier & ((key == 0) | (key == query)))[:, None]  # (B, 1, T, T)


class Batches(Dataset[TextBatch]):
    """Batch number n is a pure function of the seed and n, whichever process makes it.

    Args:
        tokenizer: The fast tokenizer's own `Tokenizer`.
        schedule: Kind of each step's batch.
        seed: Training seed.
        pool: How many scenes there are.
        filled: First step at which all of them may be used; a quarter from the start, then evenly more.
        diet: What the answers claim.
        shrink: Divide the rows by this, for a try on a small machine.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        schedule: Sequence[Kind],
        seed: int,
        pool: int,
        filled: int,
        diet: Diet,
        shrink: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.seed = seed
        self.pool = pool
        self.filled = filled
        self.diet = diet
        self.shrink = shrink
        self.special = {name: tokenizer.get_vocab()[name] for name in (PAD, BOS, EOS, IMAGE)}

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> TextBatch:
        kind = self.schedule[step]
        size = SIZES[kind]
        rng = random.Random(f"batch/{self.seed}/{step}")
        rows = max(1, size.rows // self.shrink)
        reach = math.ceil(self.pool * min(1.0, 0.25 + 0.75 * step / max(1, self.filled)))
        chosen = [int(rng.random() * reach) for _ in range(rows)]
        mirrored = [rng.random() < 0.5 for _ in range(rows)]
        packed = [self._row(kind, index, turned, rng) for index, turned in zip(chosen, mirrored, strict=True)]
        table = torch.tensor([row[:3] for row in packed])  # (B, 3, T)
        weights = torch.tensor([row[3] for row in packed])  # (B, T)
        ids, positions, turns = table.unbind(1)  # (B, T) each
        return TextBatch(kind, reach, torch.tensor(chosen), torch.tensor(mirrored), ids, positions, turns, weights)

    def _row(
        self, kind: Kind, index: int, mirrored: bool, rng: random.Random
    ) -> tuple[list[int], list[int], list[int], list[float]]:
        view = scene(TRAINING_SEED + self.seed, index)
        shown = zoom(view)[1]
        if mirrored:
            view = mirror(view)
        room = SIZES[kind].tokens
        if kind == "text":
            talk = [part for _ in range(3) for part in blind_exchanges(view, rng, self.diet)]
        else:
            about = shown if kind == "two" and rng.random() < 0.8 else ""
            talk = exchanges(view, rng, self.diet, about=about)
        ids = self._beginning(SIZES[kind].pictures)
        start = len(ids)
        positions, turns, weights = list(range(start)), [0] * start, [0.0] * start
        for turn, (question, answer) in enumerate(self._encode(kind, talk), start=1):
            length = len(question) + len(answer)
            if len(ids) + length > room:
                continue
            ids += question + answer
            positions += range(start, start + length)
            turns += [turn] * length
            # between one weight for each token and one for each answer: "Yes" is not drowned by captions
            weights += [0.0] * len(question) + [1 / math.sqrt(len(answer))] * len(answer)
        spare = room - len(ids)
        return (
            ids + [self.special[PAD]] * spare,
            positions + [0] * spare,
            turns + [-1] * spare,
            weights + [0.0] * spare,
        )

    def _beginning(self, pictures: int) -> list[int]:
        start = [self.special[BOS], *self.tokenizer.encode("USER:", add_special_tokens=False).ids]
        if pictures == 0:
            return start
        image = [self.special[IMAGE]] * IMAGE_TOKENS
        gap, line = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in (" ", "\n"))
        return start + gap + (image + line) * (pictures - 1) + image

    def _encode(self, kind: Kind, talk: Sequence[Exchange]) -> list[tuple[list[int], list[int]]]:
        lead = " " if kind == "text" else "\n"
        texts = [f"{lead}{part.prompt} ASSISTANT:" for part in talk] + [f" {part.answer}" for part in talk]
        encoded = [found.ids for found in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        return [
            (question, [*answer, self.special[EOS]])
            for question, answer in zip(encoded[: len(talk)], encoded[len(talk) :], strict=True)
        ]


def mirror(view: Scene) -> Scene:
    """Turn a scene left to right, as far as language is concerned: its boxes."""
    return replace(
        view,
        objects=tuple(
            replace(thing, box=(CANVAS - thing.box[2], thing.box[1], CANVAS - thing.box[0], thing.box[3]))
            for thing in view.objects
        ),
    )
