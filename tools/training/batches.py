"""Training batches: questions packed behind the picture that they share, each blind to the others."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from tools.training.architecture import Architecture, Grid, Kind, TextBatch
from tools.training.questions import Diet, Exchange, blind_exchanges, exchanges, zoom
from vlmfix.world.scenes import CANVAS, Scene, scene

# training scenes have seeds that nobody draws a test set from
TRAINING_SEED = 10_000_000


class Batches(Dataset[TextBatch]):
    """Batch number n is a pure function of the seed and n, whichever process makes it.

    Args:
        architecture: How prompts are written and pictures are cut.
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
        architecture: Architecture,
        tokenizer: Tokenizer,
        schedule: Sequence[Kind],
        seed: int,
        pool: int,
        filled: int,
        diet: Diet,
        shrink: int = 1,
    ) -> None:
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.seed = seed
        self.pool = pool
        self.filled = filled
        self.diet = diet
        self.shrink = shrink
        self.pad, self.end = (tokenizer.get_vocab()[name] for name in (architecture.special[0], architecture.end))

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> TextBatch:
        kind = self.schedule[step]
        size = self.architecture.sizes[kind]
        rng = random.Random(f"batch/{self.seed}/{step}")
        rows = max(1, size.rows // self.shrink)
        reach = math.ceil(self.pool * min(1.0, 0.25 + 0.75 * step / max(1, self.filled)))
        chosen = [int(rng.random() * reach) for _ in range(rows)]
        mirrored = [rng.random() < 0.5 for _ in range(rows)]
        grids = self.architecture.grids(rng, size.pictures)
        packed = [self._row(kind, index, turned, grids, rng) for index, turned in zip(chosen, mirrored, strict=True)]
        ids, turns, weights, positions = zip(*packed, strict=True)
        return TextBatch(
            kind=kind,
            reach=reach,
            grids=grids,
            scenes=torch.tensor(chosen),
            mirrored=torch.tensor(mirrored),
            ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            turns=torch.tensor(turns),
            weights=torch.tensor(weights),
        )

    def _row(
        self, kind: Kind, index: int, mirrored: bool, grids: Sequence[Grid], rng: random.Random
    ) -> tuple[list[int], list[int], list[float], list[list[int]]]:
        """Ids, turns and weights of T tokens, and their positions on each axis."""
        room = self.architecture.sizes[kind].tokens
        ids = self.architecture.beginning(self._ids, grids)
        positions = self.architecture.positions(grids, len(ids))
        after = [axis.pop() for axis in positions]
        turns, weights = [0] * len(ids), [0.0] * len(ids)
        talk = self._talk(kind, index, mirrored, rng)
        for turn, (question, answer) in enumerate(self._encode(kind, talk), start=1):
            length = len(question) + len(answer)
            if len(ids) + length > room:
                continue
            ids += question + answer
            for axis, start in zip(positions, after, strict=True):
                axis += range(start, start + length)
            turns += [turn] * length
            # between one weight for each token and one for each answer: "Yes" is not drowned by captions
            weights += [0.0] * len(question) + [1 / math.sqrt(len(answer))] * len(answer)
        spare = room - len(ids)
        return (
            ids + [self.pad] * spare,
            turns + [-1] * spare,
            weights + [0.0] * spare,
            [axis + [0] * spare for axis in positions],
        )

    def _talk(self, kind: Kind, index: int, mirrored: bool, rng: random.Random) -> list[Exchange]:
        view = scene(TRAINING_SEED + self.seed, index)
        shown = zoom(view)[1]
        if mirrored:
            view = mirror(view)
        if kind == "text":
            return [part for _ in range(3) for part in blind_exchanges(view, rng, self.diet)]
        return exchanges(view, rng, self.diet, about=shown if kind == "two" and rng.random() < 0.8 else "")

    def _encode(self, kind: Kind, talk: Sequence[Exchange]) -> list[tuple[list[int], list[int]]]:
        texts = [self.architecture.question(part.prompt, blind=kind == "text") for part in talk]
        texts += [self.architecture.answer(part.answer) for part in talk]
        encoded = [found.ids for found in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        return [
            (question, [*answer, self.end])
            for question, answer in zip(encoded[: len(talk)], encoded[len(talk) :], strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found


def mirror(view: Scene) -> Scene:
    """Turn a scene left to right, as far as language is concerned: its boxes."""
    return replace(
        view,
        objects=tuple(
            replace(thing, box=(CANVAS - thing.box[2], thing.box[1], CANVAS - thing.box[0], thing.box[3]))
            for thing in view.objects
        ),
    )
