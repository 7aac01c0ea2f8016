"""Questions about small things, and a control for methods that show a part of the picture: another part of the size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from tools.study.embedded import SMALL_SIDE
from tools.training.questions import exists_question
from vlmfix.decoders import CARVE, Decoder, ViCrop
from vlmfix.decoders.base import Refiner, Source
from vlmfix.decoders.picture.refined import Look, PictureMemo, Refined, pixel_box
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.evals.task import Sample, Workload
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.pixels import digest
from vlmfix.world.captions import absent
from vlmfix.world.coco import image_name
from vlmfix.world.language import alone
from vlmfix.world.scenes import Scene, scene

GROUP = "small"


def questions(count: int, seed: int, images: Path) -> Workload:
    """Yes/no questions about drawn scenes: every small thing that is the only one of its kind, and as many absent ones.

    Args:
        count: Number of scenes.
        seed: Of the scenes.
        images: Folder of their pictures, as ``vlmfix world make`` draws them.
    """
    samples = [sample for index in range(count) for sample in _about(scene(seed, index))]
    about = {"questions": "small things", "scenes": count, "seed": seed, "smaller than": SMALL_SIDE}
    return Workload(samples=samples, images=images, about=about)


def _about(view: Scene) -> Iterator[Sample]:
    there = [thing.category for thing in alone(view).values() if _side(thing.box) < SMALL_SIDE]
    rng = random.Random(f"small/{view.seed}/{view.index}")
    for label, names in (("yes", there), ("no", absent(view, rng, len(there)))):
        for name in names:
            yield Sample(
                id=f"{view.index}/{name}",
                image=image_name(view.index),
                prompt=exists_question(name),
                target={"label": label},
                group=GROUP,
            )


def _side(box: tuple[int, int, int, int]) -> int:
    return max(box[2] - box[0], box[3] - box[1])


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Refiner):
    """The control of a refining decoder: it shows a window of the same size and shape, but at a place drawn at random.

    What the decoder gains beyond this is what looking at the right place is worth; the rest comes from being shown an
    enlarged part at all. Each window may lie anywhere in the picture; the draw depends on the picture and the question.

    Args:
        decoder: Which chooses size and shape, CARVE or ViCrop.
    """

    name: ClassVar[str] = "elsewhere"
    source: ClassVar[Source] = Source(title="A window at a random place", year=0, arxiv="")
    acts_on: ClassVar[str] = "the picture"

    decoder: Decoder

    def refine(
        self,
        vlm: Checkpoint,
        pictures: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        memo: PictureMemo,
    ) -> list[Refined]:
        """What the decoder makes of the pictures, with every window moved."""
        found = self.decoder.refine(vlm, pictures, prompts, memo)
        return [
            self._moved(vlm, row, refined, random.Random(f"{prompt}/{digest(row)}"))
            for row, prompt, refined in zip(pictures, prompts, found, strict=True)
        ]

    def _moved(self, vlm: Checkpoint, pictures: Sequence[Image.Image], refined: Refined, rng: random.Random) -> Refined:
        if not refined.looks:
            return refined
        moved = {
            id(look.picture): self._elsewhere(vlm, picture, look, rng)
            for picture, look in zip(pictures, refined.looks, strict=True)
        }
        shown = tuple(moved[id(one)].picture if id(one) in moved else one for one in refined.pictures)
        return Refined(shown, tuple(moved.values()))

    def _elsewhere(self, vlm: Checkpoint, picture: Image.Image, look: Look, rng: random.Random) -> Look:
        """The same cut, out of the picture rolled by as much as moves another place of it under the window."""
        if look.map is None:
            return look
        width, height = picture.size
        x0, y0, x1, y1 = pixel_box(look.box, width, height)
        across, down = rng.randint(-x0, width - x1), rng.randint(-y0, height - y1)
        rolled = Image.fromarray(np.roll(np.asarray(picture), (-down, -across), axis=(0, 1)))
        cut = _cut(self.decoder, vlm, rolled, look)
        box = ((x0 + across) / width, (y0 + down) / height, (x1 + across) / width, (y1 + down) / height)
        return Look(cut.picture, box, look.map, cut.problem)

    def check(self, vlm: Checkpoint) -> str | None:
        """What the decoder says."""
        return self.decoder.check(vlm)

    def spec(self) -> str:
        """The decoder's, named as what it is."""
        return f"{self.name}({self.decoder.spec()})"


def _cut(decoder: Decoder, vlm: Checkpoint, picture: Image.Image, look: Look) -> Look:
    if look.map is None:
        return look
    if isinstance(decoder, CARVE):
        return decoder.look(picture, look.map)
    if isinstance(decoder, ViCrop):
        return decoder.look(vlm, picture, look.map)
    raise IncompatibleDecodersError(f"{decoder.name} shows no window of the picture", "use carve or vicrop")
