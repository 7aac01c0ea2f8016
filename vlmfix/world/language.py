"""Words for the world: noun phrases, places and choices that its captions and questions are built from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from vlmfix.world.categories import category

Item = TypeVar("Item")
Box = tuple[int, int, int, int]
CANVAS = 512

NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
SIDES = ("left", "right", "above", "below")

_PAIRED = {"skis", "scissors"}
_PORTIONED = {"broccoli": "piece"}
_PLACES = (
    ("in the upper left corner", "at the top", "in the upper right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left corner", "at the bottom", "in the lower right corner"),
)


class Thing(Protocol):
    """One object of a scene, as far as language is concerned."""

    @property
    def category(self) -> str:
        """COCO name."""

    @property
    def box(self) -> Box:
        """x0, y0, x1, y1 on the 512 canvas, half-open."""

    @property
    def visible(self) -> float:
        """Share of the box that is neither covered nor cut off, in [0, 1]."""


class View(Protocol):
    """One scene, as far as language is concerned."""

    @property
    def seed(self) -> int:
        """Seed of the set that the scene belongs to."""

    @property
    def index(self) -> int:
        """Number of the scene in its set."""

    @property
    def context(self) -> str:
        """Name of the context."""

    @property
    def objects(self) -> Sequence[Thing]:
        """Annotated objects, back to front."""

    def counts(self) -> dict[str, int]:
        """Category name to number of objects, the most prominent category first."""


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """Choose one item with even chances; the same on every Python version."""
    return items[int(rng.random() * len(items))]


def number_word(count: int) -> str:
    """Spell a count from 0 to 12; larger ones in digits."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def article(words: str) -> str:
    """Put "a" or "an" before a singular noun, by its first letter."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def one(name: str) -> str:
    """Singular noun phrase: "a cup", "a pair of skis", "a piece of broccoli"."""
    if name in _PAIRED:
        return f"a pair of {name}"
    if name in _PORTIONED:
        return f"a {_PORTIONED[name]} of {name}"
    return article(name)


def several(name: str, count: int) -> str:
    """Noun phrase with its number: "a cup", "two cups", "no cups", "two pairs of skis"."""
    if count == 1:
        return one(name)
    plural = category(name).plural
    if name in _PAIRED:
        plural = f"pairs of {name}"
    elif name in _PORTIONED:
        plural = f"{_PORTIONED[name]}s of {name}"
    return f"{number_word(count)} {plural}"


def listed(phrases: Sequence[str]) -> str:
    """Join noun phrases: "a", "a and b", "a, b and c"."""
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def sentence(words: str) -> str:
    """Give a sentence its capital letter and its period."""
    return f"{words[0].upper()}{words[1:]}."


def centre(box: Box) -> tuple[float, float]:
    """Middle of a box, x and y in canvas pixels."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def place(box: Box) -> str:
    """Say where a box lies on a 3 by 3 grid: "on the left", "at the top", ..."""
    x, y = centre(box)
    column, row = (min(int(3 * value / CANVAS), 2) for value in (x, y))
    return _PLACES[row][column]


def any_place(rng: random.Random) -> str:
    """A place at random, for an object that is not there."""
    return pick(rng, pick(rng, _PLACES))


def toward(start: Box, end: Box) -> str | None:
    """Say on which side of the first box the second one lies.

    Args:
        start: Box that the question names.
        end: Box of the other object.

    Returns:
        "left", "right", "above" or "below", by the longer of the two distances between the middles; None when
        the middles are less than 24 pixels apart.
    """
    (x0, y0), (x1, y1) = centre(start), centre(end)
    across, down = x1 - x0, y1 - y0
    if max(abs(across), abs(down)) < 24:
        return None
    if abs(across) >= abs(down):
        return "right" if across > 0 else "left"
    return "below" if down > 0 else "above"


def beside(side: str) -> str:
    """Say a side as a preposition: "to the left of", "above"."""
    return f"to the {side} of" if side in ("left", "right") else side


def alone(scene: View) -> dict[str, Thing]:
    """Objects that are the only one of their category, most prominent first."""
    counts = scene.counts()
    single = {thing.category: thing for thing in scene.objects if counts[thing.category] == 1}
    return {name: single[name] for name in counts if name in single}
