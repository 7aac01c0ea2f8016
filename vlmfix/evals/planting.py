"""Makes, of annotated pictures, what directions are measured on: true captions, planted ones, and masks of objects."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.chair import Chair
from vlmfix.evals.benchmarks.coco import AnnotatedPicture, Annotations, Outlines
from vlmfix.evals.benchmarks.words import Mention, words_of
from vlmfix.evals.task import Sample
from vlmfix.heads.directions.shown import Shown


class Planting:
    """Plants objects in captions: those that are often with the picture's own, and are not in it.

    Args:
        annotations: Of all pictures, which say what is often together.
        outlines: Of the objects, by image id; None where no mask is wanted.
        seed: Seed of the choice.
    """

    def __init__(
        self, annotations: Annotations, outlines: Mapping[int, Outlines] | None = None, *, seed: int = 0
    ) -> None:
        self._outlines, self._seed, self._chair = outlines, seed, Chair()
        self._together: Counter[tuple[str, str]] = Counter()
        names: set[str] = set()
        for picture in annotations.pictures.values():
            names.update(picture.objects)
            for one, other in combinations(sorted(set(picture.objects)), 2):
                self._together.update([(one, other), (other, one)])
        self._names = sorted(names)

    def shown(self, about: AnnotatedPicture, picture: Image.Image) -> Shown | None:
        """Returns what is known of a picture; None where no caption names an object, or nothing could be planted.

        Args:
            about: Its annotations.
            picture: The picture, RGB, of the size that the outlines are of.

        Raises:
            DataError: An outline cannot be read.
        """
        sample = Sample(
            id=str(about.id),
            image=about.file,
            prompt="",
            target={"objects": about.objects, "captions": about.captions},
        )
        for caption in about.captions:
            named = [mention for mention, absent in self._chair.mentions(sample, caption) if not absent]
            name = self._absent(sample, about)
            if named and name is not None:
                mask = None if self._outlines is None else _mask(about, self._outlines, picture.size)
                return Shown(
                    picture=picture,
                    objects=tuple(dict.fromkeys(mention.node for mention in named)),
                    caption=caption,
                    planted=planted(caption, named[-1], name),
                    emptied=emptied(caption, named),
                    mask=mask,
                )
        return None

    def _absent(self, sample: Sample, about: AnnotatedPicture) -> str | None:
        """Draws an object that is not in the picture, by how often it is with what is in it."""
        truth = self._chair.truth(sample)
        absent = [name for name in self._names if words_of(None).nodes[name] not in truth]
        weights = [sum(self._together[own, name] for own in set(about.objects)) for name in absent]
        if not any(weights):
            return None
        return random.Random(f"{self._seed}, {about.id}").choices(absent, weights)[0]


def planted(caption: str, mention: Mention, name: str) -> str:
    """Writes another object in the place of one that a caption names, in its number, with the article that it takes."""
    before, word = caption[: mention.start], caption[mention.start : mention.end]
    several = word.lower() != mention.word and word.lower().endswith("s") and not name.endswith("s")
    new = f"{name}s" if several else name
    if article := re.search(r"\b(an?) $", before, re.IGNORECASE):
        right = "an" if name[0] in "aeiou" else "a"
        right = right.capitalize() if article[1][0].isupper() else right
        before = f"{before[: article.start()]}{right} "
    return f"{before}{new}{caption[mention.end :]}"


def emptied(caption: str, mentions: Sequence[Mention]) -> str:
    """Takes the words of some objects out of a caption."""
    for mention in reversed(mentions):
        caption = caption[: mention.start] + caption[mention.end :]
    return re.sub(r"\s+(?=[ ,.])", "", caption).strip()


def _mask(about: AnnotatedPicture, outlines: Mapping[int, Outlines], size: tuple[int, int]) -> Tensor:
    """(height, width) bool, the pixels of all objects of a picture of (width, height)."""
    mask = Image.new("1", size)
    draw = ImageDraw.Draw(mask)
    runs = np.zeros((size[1], size[0]), dtype=bool)
    for outline in outlines.get(about.id, ()):
        if isinstance(outline, Mapping):
            runs |= _of_runs(about, outline, size)
            continue
        for part in outline:
            if not isinstance(part, list) or len(part) < 6 or len(part) % 2 or not _numbers(part):
                raise _unreadable(about, "is no list of places")
            draw.polygon(part, fill=1)
    return torch.from_numpy(np.array(mask) | runs)


def _of_runs(about: AnnotatedPicture, outline: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    counts, shape = outline.get("counts"), outline.get("size")
    if not isinstance(counts, list) or not _numbers(counts) or shape != [size[1], size[0]]:
        raise _unreadable(about, "is neither polygons nor plain runs of the picture's size")
    if any(count < 0 or count != int(count) for count in counts) or sum(counts) != size[0] * size[1]:
        raise _unreadable(about, "has runs that do not fill the picture")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, np.array(counts, dtype=np.int64)).reshape(size).T  # column after column


def _numbers(values: Collection[Any]) -> bool:
    return all(isinstance(value, int | float) and abs(value) < 1e9 for value in values)


def _unreadable(about: AnnotatedPicture, why: str) -> DataError:
    return DataError(f"an outline of an object in {about.file} {why}", "give COCO's instances, with their segmentation")
