"""The place behind the objects: bands of colour, and plain shapes that make it recognisable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from vlmfix.world.contexts import Colour, Context, Surface

CANVAS = 512
KINDS = (
    "rectangle",
    "ellipse",
    "triangle",
    "diamond",
    "ring",
    "cross",
    "windows",
    "planks",
    "blob",
    "wedge",
    "dome",
)


@dataclass(frozen=True)
class Shape:
    """One plain shape.

    Attributes:
        kind: One of `KINDS`.
        box: x0, y0, x1, y1 in pixels, half-open; may reach over the canvas.
        colour: Red, green, blue, 0 to 255.
        cover: Opacity, 0 to 256.
    """

    kind: str
    box: tuple[int, int, int, int]
    colour: Colour
    cover: int = 256


class Dice:
    """Integers from one stream; only `Random.random`, which is the same in every Python version."""

    def __init__(self, seed: str) -> None:
        self._next = Random(seed).random

    def below(self, count: int) -> int:
        """An integer from 0 to count - 1."""
        return int(self._next() * count)

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._next() * (high - low + 1))

    def chance(self, percent: int) -> bool:
        """True in so many of a hundred cases."""
        return self._next() * 100 < percent

    def choose(self, weights: Sequence[float]) -> int:
        """A position, as often as its weight says; the weights need no particular sum."""
        target = self._next() * sum(weights)
        for position, weight in enumerate(weights):
            target -= weight
            if target < 0:
                return position
        return len(weights) - 1


def surfaces(context: Context, dice: Dice) -> tuple[Surface, ...]:
    """The context's bands with this scene's own light, tints and heights."""
    light = dice.between(216, 268)
    shift = dice.between(-18, 18)
    bands = []
    for band in context.surfaces:
        tint = tuple(light + dice.between(-14, 14) for _ in range(3))
        end = band.end if band.end == CANVAS else band.end + shift
        bands.append(replace(band, end=end, top=_lit(band.top, tint), bottom=_lit(band.bottom, tint)))
    return tuple(bands)


def decor(context: Context, dice: Dice) -> tuple[Shape, ...]:
    """The shapes that belong to the place, back to front."""
    return tuple(shape for name in context.decor for shape in _DECOR[name](dice))


def clutter(dice: Dice, top: int) -> tuple[Shape, ...]:
    """Plain shapes that are no category and that stand in the way: blobs, stones, boxes without a name."""
    shapes = []
    for _ in range(dice.between(1, 5)):
        kind = ("ellipse", "triangle", "diamond", "ring", "cross", "blob", "rectangle")[dice.below(7)]
        width, height = dice.between(14, 64), dice.between(14, 52)
        if kind == "ellipse":  # a round one would pass for a ball or an orange
            height = min(height, width // 2)
        x, y = dice.between(0, CANVAS - width), dice.between(top - 40, CANVAS - height)
        colour = (dice.between(40, 210), dice.between(40, 210), dice.between(40, 210))
        shapes.append(Shape(kind, (x, y, x + width, y + height), colour, dice.between(110, 230)))
    return tuple(shapes)


def _lit(colour: Colour, tint: Sequence[int]) -> Colour:
    red, green, blue = (min(255, part * factor >> 8) for part, factor in zip(colour, tint, strict=True))
    return red, green, blue


def _box(kind: str, x: int, y: int, width: int, height: int, colour: Colour, cover: int = 256) -> Shape:
    return Shape(kind, (x, y, x + width, y + height), colour, cover)


def _cupboards(dice: Dice) -> Iterator[Shape]:
    colour = ((214, 190, 150), (168, 188, 176), (190, 200, 214), (150, 104, 72))[dice.below(4)]
    for x in range(dice.between(-40, 0), CANVAS, 92):
        yield _box("rectangle", x, 0, 86, 92, colour)
        yield _box("rectangle", x + 8, 8, 70, 76, (90, 74, 60), 50)
        yield _box("ellipse", x + 66, 66, 9, 9, (70, 70, 70))


def _window(dice: Dice) -> Iterator[Shape]:
    x, y = dice.between(40, 330), dice.between(112, 130)
    yield _box("rectangle", x, y, 130, 110, (244, 244, 240))
    yield _box("rectangle", x + 8, y + 8, 114, 94, (168, 212, 240))
    yield _box("rectangle", x + 61, y + 8, 8, 94, (244, 244, 240))


def _picture(dice: Dice) -> Iterator[Shape]:
    for x in (dice.between(20, 180), dice.between(280, 420)):
        y, width, height = dice.between(24, 60), dice.between(60, 100), dice.between(50, 80)
        yield _box("rectangle", x, y, width, height, (84, 58, 36))
        yield _box("rectangle", x + 7, y + 7, width - 14, height - 14, (206, 214, 200))
        yield _box("triangle", x + 12, y + 20, width - 24, height - 27, (110, 140, 126))


def _lamp(dice: Dice) -> Iterator[Shape]:
    x = dice.between(150, 360)
    yield _box("rectangle", x - 2, 0, 4, 60, (60, 50, 44))
    yield _box("ellipse", x - 90, 20, 180, 130, (255, 236, 170), 60)
    yield _box("triangle", x - 40, 50, 80, 40, (224, 190, 110))


def _carpet(dice: Dice) -> Iterator[Shape]:
    colour = ((236, 232, 224), (196, 70, 62), (86, 120, 176), (226, 200, 130))[dice.below(4)]
    yield _box("ellipse", -70, 280, 652, 330, (40, 24, 16), 90)
    yield _box("ellipse", -60, 270, 632, 320, colour, 246)
    yield _box("ring", -30, 284, 572, 292, (120, 100, 90), 40)


def _curtains(dice: Dice) -> Iterator[Shape]:
    colour = ((170, 76, 70), (88, 120, 150), (124, 146, 96), (196, 160, 90))[dice.below(4)]
    x = dice.between(30, 300)
    yield _box("rectangle", x, 40, 150, 150, (180, 216, 240))
    yield _box("cross", x, 40, 150, 150, (246, 246, 246), 150)
    for side in (x - 22, x + 124):
        yield _box("rectangle", side, 28, 48, 190, colour)
        yield _box("planks", side, 28, 48, 190, (30, 20, 20), 50)


def _rug(dice: Dice) -> Iterator[Shape]:
    colour = ((160, 66, 66), (70, 100, 140), (190, 176, 150), (90, 120, 90))[dice.below(4)]
    x, width = dice.between(20, 120), dice.between(300, 380)
    yield _box("ellipse", x, 372, width, 120, colour, 210)
    yield _box("ring", x + 16, 380, width - 32, 104, (240, 230, 210), 110)


def _mirror(dice: Dice) -> Iterator[Shape]:
    x = dice.between(60, 300)
    yield _box("ellipse", x, 30, 130, 170, (140, 150, 156))
    yield _box("ellipse", x + 8, 38, 114, 154, (226, 240, 246))
    yield _box("diamond", x + 30, 70, 40, 80, (250, 254, 255), 120)


def _towel(dice: Dice) -> Iterator[Shape]:
    colour = ((236, 150, 150), (250, 250, 240), (120, 170, 150), (240, 200, 110))[dice.below(4)]
    x = dice.between(10, 60) if dice.chance(50) else dice.between(400, 440)
    yield _box("rectangle", x - 10, 150, 82, 6, (120, 126, 130))
    yield _box("rectangle", x, 152, 62, 116, colour)
    yield _box("rectangle", x, 240, 62, 8, (90, 90, 100), 90)


def _blinds(dice: Dice) -> Iterator[Shape]:
    x = dice.between(20, 260)
    yield _box("rectangle", x, 24, 220, 150, (206, 228, 244))
    for y in range(28, 172, 16):
        yield _box("rectangle", x, y, 220, 6, (240, 242, 244))


def _board(dice: Dice) -> Iterator[Shape]:
    x = dice.between(290, 370)
    yield _box("rectangle", x, 60, 130, 96, (150, 154, 160))
    yield _box("rectangle", x + 6, 66, 118, 84, (246, 248, 248))
    for step in range(3):
        length = dice.between(40, 96)
        yield _box("rectangle", x + 14, 82 + step * 20, length, 4, (90, 110, 170), 170)


def _buildings(dice: Dice) -> Iterator[Shape]:
    x = dice.between(-50, 0)
    while x < CANVAS:
        width, tall = dice.between(80, 150), dice.between(110, 232)
        shade = dice.between(110, 190)
        colour = (shade + dice.between(-10, 30), shade - dice.between(0, 20), shade - dice.between(0, 40))
        yield _box("rectangle", x, 262 - tall, width, tall, colour)
        yield _box("windows", x + 12, 274 - tall, width - 24, tall - 34, (236, 226, 160), 220)
        x += width + dice.between(0, 10)


def _lane(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(-90, 0), CANVAS, 128):
        yield _box("rectangle", x, 404, 72, 9, (240, 236, 214), 220)
    yield _box("rectangle", 0, 492, CANVAS, 5, (240, 236, 214), 150)


def _pillars(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(20, 80), CANVAS, 180):
        yield _box("rectangle", x, 60, 20, 224, (92, 112, 110))
        yield _box("triangle", x - 26, 88, 72, 26, (80, 98, 98))


def _rails(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(-30, 0), CANVAS, 46):
        yield _box("rectangle", x, 306, 22, 62, (84, 62, 48), 220)
    for y in (316, 350):
        yield _box("rectangle", 0, y, CANVAS, 7, (196, 200, 206))


def _barn(dice: Dice) -> Iterator[Shape]:
    x, y = dice.between(10, 340), dice.between(146, 166)
    yield _box("rectangle", x, y, 140, 100, (176, 50, 44))
    yield _box("triangle", x - 14, y - 56, 168, 58, (110, 44, 42))
    yield _box("rectangle", x + 48, y + 40, 44, 60, (240, 234, 224))
    yield _box("diamond", x + 52, y + 44, 36, 52, (176, 50, 44))


def _fence(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(-20, 0), CANVAS, 58):
        yield _box("rectangle", x, 268, 9, 50, (214, 200, 176))
    for y in (278, 298):
        yield _box("rectangle", 0, y, CANVAS, 6, (214, 200, 176))


def _trees(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(-30, 10), CANVAS, 96):
        size, drop = dice.between(84, 130), dice.between(0, 26)
        green = dice.between(96, 140)
        yield _box("rectangle", x + size // 2 - 8, 150 + drop, 16, 80, (104, 74, 48))
        yield _box("ellipse", x, 70 + drop, size, 110, (50, green, 54))
        yield _box("blob", x, 70 + drop, size, 110, (80, green + 40, 70), 130)


def _path(dice: Dice) -> Iterator[Shape]:
    x = dice.between(60, 260)
    yield _box("wedge", x, 214, 240, 300, (214, 192, 150), 230)


def _sun(dice: Dice) -> Iterator[Shape]:
    x, y, size = dice.between(20, 420), dice.between(10, 70), dice.between(50, 74)
    yield _box("ellipse", x - 14, y - 14, size + 28, size + 28, (255, 244, 190), 90)
    yield _box("ellipse", x, y, size, size, (255, 240, 150))


def _foam(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(-60, 0), CANVAS, 84):
        yield _box("dome", x, 292, 96, 18, (250, 252, 252), 200)
    for _ in range(5):
        x, y = dice.between(0, 440), dice.between(210, 276)
        yield _box("rectangle", x, y, dice.between(30, 70), 3, (230, 246, 250), 150)


def _palm(dice: Dice) -> Iterator[Shape]:
    x = dice.between(10, 60) if dice.chance(50) else dice.between(400, 450)
    yield _box("wedge", x + 26, 120, 22, 220, (140, 104, 66))
    for left, top in ((-40, 84), (24, 84), (-22, 66), (10, 62)):
        yield _box("dome", x + left, top, 86, 40, (48, 140, 66), 235)


def _acacias(dice: Dice) -> Iterator[Shape]:
    for x in (dice.between(-30, 90), dice.between(170, 290), dice.between(350, 440)):
        y, size = dice.between(150, 190), dice.between(90, 140)
        yield _box("rectangle", x + size // 2 - 5, y + 20, 10, 270 - y, (92, 64, 40))
        yield _box("dome", x, y, size, 42, (98, 116, 48))


def _stripes(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(-70, 0), CANVAS, 144):
        yield _box("rectangle", x, 236, 72, 276, (150, 230, 130), 60)


def _lines(dice: Dice) -> Iterator[Shape]:
    y, x = dice.between(284, 320), dice.between(100, 300)
    yield _box("rectangle", 0, y, CANVAS, 6, (246, 250, 246), 220)
    yield _box("rectangle", x, y, 6, CANVAS - y, (246, 250, 246), 220)
    yield _box("ring", x - 120, y + 30, 246, 130, (246, 250, 246), 150)


def _mountains(dice: Dice) -> Iterator[Shape]:
    for x in (dice.between(-120, -40), dice.between(110, 190), dice.between(290, 380)):
        top, width = dice.between(40, 110), dice.between(230, 300)
        tall = 250 - top
        yield _box("triangle", x, top, width, tall, (128, 146, 172))
        yield _box("triangle", x + width * 3 // 10, top, width * 2 // 5, tall * 2 // 5, (246, 250, 253))


def _firs(dice: Dice) -> Iterator[Shape]:
    for x in range(dice.between(0, 40), CANVAS, 110):
        y, tall = dice.between(190, 230), dice.between(70, 100)
        yield _box("rectangle", x + 20, y + tall - 6, 10, 16, (90, 66, 50))
        yield _box("triangle", x, y + tall // 3, 50, tall * 2 // 3, (42, 92, 74))
        yield _box("triangle", x + 7, y, 36, tall * 2 // 3, (56, 110, 88))


def _tower(dice: Dice) -> Iterator[Shape]:
    x = dice.between(40, 420)
    yield _box("wedge", x + 8, 110, 40, 170, (196, 200, 206))
    yield _box("rectangle", x - 8, 84, 72, 34, (70, 96, 120))
    yield _box("rectangle", x - 12, 76, 80, 10, (220, 224, 228))
    far = x - 250 if x > 250 else x + 110
    yield _box("dome", far, 216, 150, 70, (170, 176, 186))


_DECOR: dict[str, Callable[[Dice], Iterator[Shape]]] = {
    "cupboards": _cupboards,
    "window": _window,
    "picture": _picture,
    "lamp": _lamp,
    "carpet": _carpet,
    "curtains": _curtains,
    "rug": _rug,
    "mirror": _mirror,
    "towel": _towel,
    "blinds": _blinds,
    "board": _board,
    "buildings": _buildings,
    "lane": _lane,
    "pillars": _pillars,
    "rails": _rails,
    "barn": _barn,
    "fence": _fence,
    "trees": _trees,
    "path": _path,
    "sun": _sun,
    "foam": _foam,
    "palm": _palm,
    "acacias": _acacias,
    "stripes": _stripes,
    "lines": _lines,
    "mountains": _mountains,
    "firs": _firs,
    "tower": _tower,
}
