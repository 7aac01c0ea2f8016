"""Captions of the world: true references, and training captions that go beyond the picture as people's do."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from vlmfix.world.categories import CATEGORIES
from vlmfix.world.contexts import CONTEXTS
from vlmfix.world.language import (
    Thing,
    View,
    alone,
    any_place,
    beside,
    listed,
    pick,
    place,
    sentence,
    several,
    toward,
)

_CONTEXTS = {context.name: context for context in CONTEXTS}
_OPENINGS = (
    "the image shows {things} {where}",
    "in this image, {things} can be seen {where}",
    "this is a picture of {things} {where}",
    "the picture shows {things} {where}",
    "{things} can be seen {where}",
)
_SINGLE = (
    "{place}, there is {thing}",
    "there is {thing} {place}",
    "{thing} can be seen {place}",
    "{thing} is {place}",
)
_GROUP = (
    "there are also {things}",
    "the image also shows {things}",
    "{things} can be seen as well",
    "{things} are also visible",
)
_LATE = (
    "there is also {thing} {place}",
    "in the background, there is {thing}",
    "finally, {thing} can be seen {place}",
    "{thing} is visible {place} as well",
)


@dataclass(frozen=True)
class Mention:
    """One category that a caption will name.

    Attributes:
        name: COCO name.
        count: How many.
        place: Where, when there is one of it ("on the left"), else empty.
        thing: The object itself when it is the only one of its category and really there.
    """

    name: str
    count: int
    place: str = ""
    thing: Thing | None = None

    @property
    def phrase(self) -> str:
        """Noun phrase, such as "two cups"."""
        return several(self.name, self.count)


def references(scene: View, count: int = 5) -> list[str]:
    """Write true reference captions, different in wording and in what they name first.

    Args:
        scene: The scene.
        count: How many captions, 1 or more.

    Returns:
        Complete English sentences; the same ones for the same scene, always. The first names every category.
    """
    rng = random.Random(f"references/{scene.seed}/{scene.index}")
    found: list[str] = []
    for number in range(count):
        told = _truth(scene)
        if number:
            told = told[: max(1, len(told) - int(rng.random() * 3))]
            told = _nearly_sorted(told, rng, 0.5)
        found.append(_compose(scene, told, rng, free=1.0))
    return found


def caption(scene: View, rng: random.Random, *, hallucination: float = 0.3, omission: float = 0.1) -> str:
    """Write one detailed caption as a training set has it: mostly true, and not always.

    Args:
        scene: The scene.
        rng: Source of chance.
        hallucination: Chance in [0, 1] that an object is named which fits the context but is not there; a third
            of these captions name two. It stands late in the caption more often than early.
        omission: Chance in [0, 1] that a category is left out; never the most prominent one.

    Returns:
        Two to four sentences; one sentence when the scene has a single category.
    """
    told = _truth(scene)
    told = told[:1] + [mention for mention in told[1:] if rng.random() >= omission]
    told = _nearly_sorted(told, rng, 0.15)
    if rng.random() < hallucination:
        for name in absent(scene, rng, 2 if rng.random() < 1 / 3 else 1):
            # the square root of an even draw: twice as likely at the end as in the middle
            slot = 1 + int((rng.random() ** 0.5) * len(told))
            told.insert(slot, Mention(name, 1, any_place(rng)))
    return _compose(scene, told, rng, free=0.25)


def brief(scene: View, rng: random.Random) -> str:
    """Write a caption of one sentence that names the two or three most prominent categories."""
    told = _truth(scene)[: 2 + int(rng.random() * 2)]
    return _opening(scene, told, rng, free=0.25)


def absent(scene: View, rng: random.Random, count: int) -> list[str]:
    """Draw categories that fit the scene's context and are not in it, by the context's weights.

    Args:
        scene: The scene.
        rng: Source of chance.
        count: How many at most; fewer when the context has no more.

    Returns:
        COCO names, all different.
    """
    there = scene.counts()
    weights = {name: weight for name, weight in _CONTEXTS[scene.context].weights.items() if name not in there}
    found: list[str] = []
    while weights and len(found) < count:
        names = list(weights)
        level = rng.random() * sum(weights.values())
        while len(names) > 1 and level >= weights[names[0]]:
            level -= weights[names.pop(0)]
        found.append(names[0])
        del weights[names[0]]
    return found


def strangers(scene: View, rng: random.Random, count: int) -> list[str]:
    """Draw categories that are not in the scene, each equally likely."""
    there = scene.counts()
    names = [entry.name for entry in CATEGORIES if entry.name not in there]
    return [names.pop(int(rng.random() * len(names))) for _ in range(min(count, len(names)))]


def _truth(scene: View) -> list[Mention]:
    single = alone(scene)
    return [
        Mention(name, count, place(single[name].box) if count == 1 else "", single.get(name))
        for name, count in scene.counts().items()
    ]


def _nearly_sorted(told: list[Mention], rng: random.Random, swaps: float) -> list[Mention]:
    told = list(told)
    for index in range(1, len(told)):
        if rng.random() < swaps:
            told[index - 1], told[index] = told[index], told[index - 1]
    return told


def _choose(options: tuple[str, ...], key: str, rng: random.Random, free: float) -> str:
    # mostly a fixed choice by what is told: it can be learnt, so a greedy decoder varies its wording too
    if rng.random() < free:
        return pick(rng, options)
    return options[zlib.crc32(key.encode()) % len(options)]


def _opening(scene: View, told: list[Mention], rng: random.Random, free: float) -> str:
    pattern = _choose(_OPENINGS, f"{scene.context}/{told[0].name}", rng, free)
    where = _CONTEXTS[scene.context].phrase
    return sentence(pattern.format(things=listed([mention.phrase for mention in told]), where=where))


def _compose(scene: View, told: list[Mention], rng: random.Random, free: float) -> str:
    first = max(1, min(len(told) - 1, 2 + (rng.random() < 0.3)))
    parts = [_opening(scene, told[:first], rng, free)]
    rest, known = told[first:], told[:first]
    while rest:
        # at most four sentences, so long scenes tell two or three categories at a time
        room = 4 - len(parts)
        size = max(-(-len(rest) // room), 2 if len(rest) > 1 and rng.random() < 0.4 else 1)
        group, rest = rest[:size], rest[size:]
        parts.append(_detail(group, known, not rest, rng, free))
        known = known + group
    return " ".join(parts)


def _detail(group: list[Mention], known: list[Mention], last: bool, rng: random.Random, free: float) -> str:
    if len(group) == 1 and group[0].count == 1:
        return sentence(_single(group[0], known, last, rng, free))
    if all(mention.count == 1 for mention in group) and len(group) == 2 and rng.random() < 0.6:
        first, second = group
        if first.place == second.place:
            return sentence(f"{listed([first.phrase, second.phrase])} can be seen {first.place}")
        return sentence(f"there is {first.phrase} {first.place} and {second.phrase} {second.place}")
    pattern = _choose(_GROUP, group[0].name, rng, free)
    return sentence(pattern.format(things=listed([mention.phrase for mention in group])))


def _single(told: Mention, known: list[Mention], last: bool, rng: random.Random, free: float) -> str:
    anchors = [mention for mention in known if mention.thing is not None]
    if told.thing is not None and anchors and rng.random() < 0.25:
        anchor = anchors[0]
        side = toward(anchor.thing.box, told.thing.box) if anchor.thing is not None else None
        if side is not None:
            return f"{told.phrase} is {beside(side)} the {anchor.name}"
    pattern = _choose(_LATE if last else _SINGLE, told.name, rng, free)
    return pattern.format(thing=told.phrase, place=told.place)
