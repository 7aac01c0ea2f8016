"""POPE's yes/no questions about objects, built by the official rule."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from vlmfix.errors import DataError

SPLITS = ("random", "popular", "adversarial")
IMAGES = 500  # pictures that are asked about, at most
POSITIVES = 3  # yes questions per picture, each followed by a no question

Picture = tuple[str, Sequence[str]]  # file name, its objects without repeats


@dataclass(frozen=True)
class Statistics:
    """What the chosen pictures hold.

    Attributes:
        popular: Object names, the most frequent first; equal ones as first seen.
        together: For each object the others, the one that shares the most pictures with it first.
    """

    popular: tuple[str, ...]
    together: Mapping[str, tuple[str, ...]]


def choose(pictures: Iterable[Picture], *, seed: int) -> list[Picture]:
    """Draw the pictures to ask about.

    Args:
        pictures: Any number of pictures; only the chosen ones are kept in memory.
        seed: Seed of the draw.

    Returns:
        Up to 500 pictures with at least three objects each, drawn uniformly.
    """
    draw = Random(f"pope pictures {seed}").random
    chosen: list[Picture] = []
    eligible = 0
    for picture in pictures:
        if len(picture[1]) < POSITIVES:
            continue
        eligible += 1
        if len(chosen) < IMAGES:
            chosen.append(picture)
        elif (place := int(draw() * eligible)) < IMAGES:
            chosen[place] = picture
    return chosen


def statistics(pictures: Sequence[Picture]) -> Statistics:
    """Count objects, and pairs of objects, over pictures."""
    counts: dict[str, int] = {}
    pairs: dict[str, dict[str, int]] = {}
    for _, objects in pictures:
        for name in objects:
            counts[name] = counts.get(name, 0) + 1
            others = pairs.setdefault(name, {})
            for other in objects:
                if other != name:
                    others[other] = others.get(other, 0) + 1
    return Statistics(_descending(counts), {name: _descending(others) for name, others in pairs.items()})


def lines(pictures: Sequence[Picture], *, split: str, seed: int, names: Sequence[str] = ()) -> Iterator[str]:
    """Write the questions of one split, six per picture, yes and no in turn.

    The first three objects of each picture are asked for. The no question after each names an object that is
    neither in the picture nor asked before: any one (random), the most frequent one (popular), or the one
    that most often stands beside the object just asked for (adversarial; any one when none is left).

    Args:
        pictures: The chosen pictures, with three or more objects each.
        split: One of `SPLITS`.
        seed: Seed of the random draws.
        names: Further object names, for no questions that the pictures' own objects cannot fill; this happens
            with a few pictures only.

    Yields:
        JSON objects with the keys question_id, image, text and label, without line ends.

    Raises:
        DataError: The split is unknown, or no object is left to ask for.
    """
    if split not in SPLITS:
        raise DataError(f"no POPE split is called {split!r}", hint=f"use one of: {', '.join(SPLITS)}")
    about = statistics(pictures)
    draw = Random(f"pope {split} {seed}").random
    number = 0
    for image, objects in pictures:
        taken = set(objects)
        for present in objects[:POSITIVES]:
            order = {"random": (), "popular": about.popular, "adversarial": about.together[present]}[split]
            absent = next((name for name in order if name not in taken), None)
            if absent is None:
                absent = _any(about.popular, taken, draw()) or _any(names, taken, draw())
            if absent is None:
                raise DataError(f"no object is left for a no question about {image}", hint="use more pictures")
            taken.add(absent)
            for name, label in ((present, "yes"), (absent, "no")):
                number += 1
                entry = {"question_id": number, "image": image, "text": question(name), "label": label}
                yield json.dumps(entry)


def question(name: str) -> str:
    """Ask for an object, such as "Is there an umbrella in the image?"."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def _descending(counts: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(counts, key=lambda name: -counts[name]))  # stable: ties stay as first seen


def _any(names: Sequence[str], taken: set[str], chance: float) -> str | None:
    """A name that is not taken, each as likely; None when all are."""
    free = [name for name in names if name not in taken]
    return free[int(chance * len(free))] if free else None
