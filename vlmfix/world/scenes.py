"""Scenes: what is in a picture and where, before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from vlmfix.errors import DataError
from vlmfix.world.backdrop import CANVAS, Dice, Shape, clutter, decor, surfaces
from vlmfix.world.categories import DRAWN
from vlmfix.world.contexts import CONTEXTS, Colour, Context, Surface
from vlmfix.world.sprites import SIZES, sprites, sprites_of

__all__ = ["CANVAS", "Placed", "Scene", "scene", "visible_share"]

Box = tuple[int, int, int, int]
FULL = 256  # cover of an opaque object

_BIG = frozenset(
    "airplane,bus,train,truck,boat,car,elephant,giraffe,couch,bed,horse,cow,zebra,person,toilet,tv".split(",")
)
_SMALL = frozenset(
    "fork,knife,spoon,cup,mouse,cell phone,toothbrush,scissors,carrot,apple,orange,banana,bird,sports ball,"
    "frisbee,donut,wine glass,tie,clock,broccoli".split(",")
)
_FLYING = frozenset(("airplane", "kite", "bird"))
_HANGING = frozenset(("clock", "tie"))
_TOGETHER = (
    ("fork", "knife", "spoon"),
    ("laptop", "mouse", "keyboard"),
    ("bowl", "spoon"),
    ("wine glass", "bottle"),
    ("person", "handbag"),
    ("person", "surfboard"),
    ("person", "skis"),
    ("person", "snowboard"),
    ("person", "tennis racket", "sports ball"),
    ("dog", "frisbee"),
    ("bed", "teddy bear"),
    ("couch", "tv"),
    ("toilet", "toothbrush"),
    ("car", "traffic light", "stop sign"),
    ("suitcase", "train"),
    ("sheep", "cow", "horse"),
    ("giraffe", "zebra", "elephant"),
)
_SINGLE = frozenset(("toilet", "bed", "couch", "tv", "train", "airplane"))  # rarely more than one


@dataclass(frozen=True)
class Placed:
    """One object of a scene.

    Attributes:
        category: COCO name.
        box: x0, y0, x1, y1 of its opaque pixels on the canvas, cut at the border, half-open.
        visible: Share of its box, in [0, 1], that is neither covered by later boxes nor cut by the border.
        sprite: Number of its cell on the sheet.
        size: Position in `vlmfix.world.sprites.SIZES`.
        origin: x, y of the upper left corner before the border cuts.
        mirrored: Drawn left to right.
        tint: Factors of red, green and blue in 256ths.
        cover: Opacity, 0 to 256; a low one blends it with the background.
    """

    category: str
    box: Box
    visible: float
    sprite: int
    size: int
    origin: tuple[int, int]
    mirrored: bool
    tint: Colour
    cover: int


@dataclass(frozen=True)
class Scene:
    """One picture of the world.

    Attributes:
        seed: Seed of the world.
        index: Number of the scene in its world.
        context: `Context.name`.
        objects: What is annotated, back to front.
        surfaces: Bands of the background.
        shapes: Decor, clutter and shadows, back to front, all behind the objects.
        grain: Seed of the background's noise.
    """

    seed: int
    index: int
    context: str
    objects: tuple[Placed, ...]
    surfaces: tuple[Surface, ...]
    shapes: tuple[Shape, ...]
    grain: int

    def counts(self) -> dict[str, int]:
        """Number of objects per category name, the one with the largest visible area first."""
        areas: dict[str, float] = {}
        counts: dict[str, int] = {}
        for placed in self.objects:
            x0, y0, x1, y1 = placed.box
            area = placed.visible * (x1 - x0) * (y1 - y0)
            areas[placed.category] = max(areas.get(placed.category, 0.0), area)
            counts[placed.category] = counts.get(placed.category, 0) + 1
        return {name: counts[name] for name in sorted(counts, key=lambda name: (-areas[name], name))}


def scene(seed: int, index: int) -> Scene:
    """Compose one scene, a pure function of its arguments.

    Args:
        seed: Seed of the world, any integer.
        index: Number of the scene, 0 or more.

    Returns:
        The same scene on every machine.

    Raises:
        DataError: The index is negative.
    """
    if index < 0:
        raise DataError(f"scene index {index} is negative", hint="scenes count from 0")
    dice = Dice(f"vlmfix world {seed} {index}")
    context = CONTEXTS[dice.below(len(CONTEXTS))]
    bands = surfaces(context, dice)
    shapes = decor(context, dice) + clutter(dice, context.ground[0])
    objects = _place(_categories(context, dice), context, dice)
    shadows = tuple(_shadow(placed) for placed in objects if placed.category not in _FLYING | _HANGING)
    return Scene(
        seed=seed,
        index=index,
        context=context.name,
        objects=objects,
        surfaces=bands,
        shapes=shapes + shadows,
        grain=dice.below(1 << 20),
    )


def visible_share(box: Box, full: Box, later: Sequence[Box]) -> float:
    """Share of an object's full box that remains.

    Args:
        box: The box cut at the border.
        full: The box before the border cuts.
        later: Boxes that are drawn over it.

    Returns:
        Area of `box` outside all of `later`, divided by the area of `full`; in [0, 1].
    """
    x0, y0, x1, y1 = box
    area = (x1 - x0) * (y1 - y0) - _union(_overlaps(box, later))
    return area / ((full[2] - full[0]) * (full[3] - full[1]))


def _overlaps(box: Box, others: Sequence[Box]) -> list[Box]:
    """What other boxes share with a box."""
    x0, y0, x1, y1 = box
    return [
        (max(x0, a), max(y0, b), min(x1, c), min(y1, d))
        for a, b, c, d in others
        if a < x1 and c > x0 and b < y1 and d > y0
    ]


def _union(boxes: Sequence[Box]) -> int:
    """Area that at least one box covers."""
    if len(boxes) <= 1:
        return sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
    cuts = sorted({edge for box in boxes for edge in (box[0], box[2])})
    area = 0
    for left, right in pairwise(cuts):
        reached = 0
        below = -1
        for y0, y1 in sorted((box[1], box[3]) for box in boxes if box[0] <= left and box[2] >= right):
            below = max(below, y0)
            if y1 > below:
                reached += y1 - below
                below = y1
        area += (right - left) * reached
    return area


@cache
def _companions() -> dict[str, frozenset[str]]:
    return {
        entry.name: frozenset(name for group in _TOGETHER if entry.name in group for name in group) for entry in DRAWN
    }


def _categories(context: Context, dice: Dice) -> list[str]:
    """Draw 3 to 7 categories of the place and repeat some: 4 to 9 names."""
    weights = dict(context.weights)
    distinct: list[str] = []
    for _ in range(3 + dice.choose((24, 30, 24, 14, 8))):
        if dice.chance(4):  # something that nobody expects here
            name = DRAWN[dice.below(len(DRAWN))].name
        else:
            name = list(weights)[dice.choose(tuple(weights.values()))]
        while name in distinct:
            name = list(weights)[dice.choose(tuple(weights.values()))]
        distinct.append(name)
        weights.pop(name, None)
        for friend in _companions()[name]:
            if friend in weights:
                weights[friend] *= 2.5
    names = list(distinct)
    extra = max(4 - len(names), min(9 - len(names), dice.choose((34, 28, 20, 12, 6))))
    for _ in range(extra):
        again = tuple(0.1 if name in _SINGLE else 1.0 for name in distinct)
        names.append(distinct[dice.choose(again)])
    return names


def _size(name: str, dice: Dice, *, faint: bool) -> int:
    """Position in `SIZES`: large, medium and small objects, by what they are."""
    if name in _BIG:
        shares = (70, 22, 8)
    elif name in _SMALL:
        shares = (16, 42, 42)
    else:
        shares = (40, 36, 24)
    largest = 12 if name in _SMALL else 16
    low, high = ((10, largest), (6, 9), (0, 5))[dice.choose(shares)]
    if faint:
        low = min(high, low + 2)
    return dice.between(low, high)


def _place(names: Sequence[str], context: Context, dice: Dice) -> tuple[Placed, ...]:
    """Give every name a sprite, a size and a place, so that each stays visible."""
    drafts = []
    for name in names:
        choices = sprites_of()[name]
        faint = dice.chance(14)
        size = _size(name, dice, faint=faint)
        dark = dice.between(80, 130) if not faint and dice.chance(10) else 256
        tint = tuple(dark * dice.between(192, 256) >> 8 for _ in range(3))
        cover = dice.between(90, 150) if faint else FULL
        drafts.append(
            (
                _standing(name, context, size, dice),
                Placed(
                    category=name,
                    box=(0, 0, 0, 0),
                    visible=1.0,
                    sprite=choices[dice.below(len(choices))].number,
                    size=size,
                    origin=(0, 0),
                    mirrored=dice.chance(50),
                    tint=(tint[0], tint[1], tint[2]),
                    cover=cover,
                ),
            )
        )
    drafts.sort(key=lambda draft: draft[0])  # what stands lower is nearer
    placed: list[Placed] = []
    for bottom, draft in drafts:
        found = _fit(draft, bottom, placed, dice)
        if found is not None:
            placed.append(found)
    return tuple(
        replace(item, visible=_visible(item, [later.box for later in placed[number + 1 :]]))
        for number, item in enumerate(placed)
    )


def _standing(name: str, context: Context, size: int, dice: Dice) -> int:
    """Row of the object's lower edge."""
    if name in _FLYING and dice.chance(70):
        return dice.between(SIZES[size], SIZES[size] + 130)
    if name in _HANGING and dice.chance(70):
        return dice.between(SIZES[size] + 10, max(SIZES[size] + 20, context.ground[0] - 60))
    if name == "boat" and context.name == "beach":
        return dice.between(236, 318)
    if name == "train" and context.name == "station":
        return dice.between(340, 376)
    top, end = context.ground
    nearer = (end - top) * size // (2 * len(SIZES))  # large things stand further down
    return dice.between(top + nearer, end)


def _fit(draft: Placed, bottom: int, placed: Sequence[Placed], dice: Dice) -> Placed | None:
    """Find a place that hides nothing; smaller when it is crowded; None when nothing helps."""
    size = draft.size
    for attempt in range(48):
        if attempt and attempt % 6 == 0:
            size = max(draft.size // 2, size - 2, 1)
        width, height = sprites()[draft.sprite].drawn[size]
        x = dice.between(-width // 5, CANVAS - width * 4 // 5)
        y = min(max(bottom, height * 4 // 5), CANVAS + height // 5) - height
        box = (max(0, x), max(0, y), min(CANVAS, x + width), min(CANVAS, y + height))
        item = replace(draft, size=size, origin=(x, y), box=box)
        if all(
            _stays(other, [later.box for later in placed[number + 1 :]], item) for number, other in enumerate(placed)
        ):
            return item
        bottom += dice.between(-12, 12)
    return None


def _stays(other: Placed, later: Sequence[Box], item: Placed) -> bool:
    """Whether a person still finds an object when one more comes before it."""
    if item.cover < FULL and _overlaps(other.box, [item.box]):
        return False  # what is faint would be lost on another object
    return _visible(other, [*later, item.box]) >= (0.7 if other.cover < FULL else 0.3)


def _visible(item: Placed, later: Sequence[Box]) -> float:
    width, height = sprites()[item.sprite].drawn[item.size]
    x, y = item.origin
    return visible_share(item.box, (x, y, x + width, y + height), later)


def _shadow(placed: Placed) -> Shape:
    """A soft dark ellipse under the object's lower edge."""
    width, height = sprites()[placed.sprite].drawn[placed.size]
    x, y = placed.origin
    tall = max(4, width // 7)
    box = (x + width // 10, y + height - tall * 2 // 3, x + width * 9 // 10, y + height + tall // 3)
    return Shape("ellipse", box, (20, 20, 26), placed.cover * 90 >> 8)
