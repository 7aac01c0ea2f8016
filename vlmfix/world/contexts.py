"""Where scenes take place, what stands there, and what such a place looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Surface:
    """One horizontal band of the background: sky, wall, floor, water.

    Attributes:
        end: Lower edge in pixels of the 512 canvas before the scene's own shift.
        top: Colour at its upper edge.
        bottom: Colour at its lower edge.
        grain: Strength of its noise, 0 to 64.
        grid: Width and height in pixels of its tiles or planks, 0 for no lines in that direction.
    """

    end: int
    top: Colour
    bottom: Colour
    grain: int = 8
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Context:
    """A kind of place.

    Attributes:
        name: Such as "kitchen".
        phrase: Fits after "a scene", such as "in a kitchen".
        weights: Category name to relative frequency: typical ones 1 or more, occasional ones less.
        surfaces: Bands of the background from top to bottom.
        decor: Names of the things that make the place recognisable and are no COCO category.
        ground: Range of rows where things stand: upper and lower end for their lower edges.
    """

    name: str
    phrase: str
    weights: Mapping[str, float]
    surfaces: tuple[Surface, ...]
    decor: tuple[str, ...]
    ground: tuple[int, int] = (300, 506)


def _weights(person: float, typical: str, occasional: str) -> Mapping[str, float]:
    """Frequencies from two comma-separated lists; a name may carry its own weight as name:1.5."""
    weights = {"person": person}
    for names, usual in ((typical, 1.0), (occasional, 0.3)):
        for entry in names.split(","):
            name, _, own = entry.strip().partition(":")
            weights[name] = float(own) if own else usual
    return MappingProxyType(weights)


CONTEXTS: tuple[Context, ...] = (
    Context(
        name="kitchen",
        phrase="in a kitchen",
        weights=_weights(
            1.6,
            "bowl:1.8, cup:1.8, knife:1.5, bottle:1.5, spoon:1.2, broccoli, carrot, apple, banana, orange",
            "fork, chair:0.5, potted plant, clock, sandwich, wine glass, cat:0.2, vase, scissors, dog:0.2",
        ),
        surfaces=(
            Surface(300, (226, 232, 222), (206, 216, 206), 4, (44, 34)),
            Surface(330, (120, 92, 70), (150, 116, 88), 6),
            Surface(512, (196, 180, 156), (170, 150, 126), 6, (64, 0)),
        ),
        decor=("cupboards", "window"),
        ground=(312, 500),
    ),
    Context(
        name="dining room",
        phrase="in a dining room",
        weights=_weights(
            1.8,
            "fork:1.6, wine glass:1.6, chair:1.6, cup:1.2, knife:1.2, pizza, cake, bottle, spoon, bowl",
            "sandwich:0.5, donut:0.5, hot dog, vase:0.5, potted plant, orange, cell phone, handbag, clock",
        ),
        surfaces=(
            Surface(250, (196, 150, 112), (178, 128, 92), 4, (36, 0)),
            Surface(512, (150, 96, 56), (112, 68, 38), 12, (0, 44)),
        ),
        decor=("picture", "lamp", "carpet"),
        ground=(290, 504),
    ),
    Context(
        name="living room",
        phrase="in a living room",
        weights=_weights(
            1.7,
            "couch:2, tv:1.6, potted plant:1.2, book:1.2, cat, chair, vase",
            "dog:0.6, clock:0.6, laptop, cell phone:0.4, cup:0.5, teddy bear:0.4, bottle, wine glass, bowl:0.2",
        ),
        surfaces=(
            Surface(290, (214, 196, 172), (198, 178, 152), 4),
            Surface(304, (240, 236, 228), (220, 214, 204), 2),
            Surface(512, (172, 130, 88), (140, 100, 64), 10, (90, 26)),
        ),
        decor=("picture", "curtains", "rug"),
        ground=(330, 506),
    ),
    Context(
        name="bedroom",
        phrase="in a bedroom",
        weights=_weights(
            1.2,
            "bed:2.4, teddy bear:1.4, book:1.2, clock, cell phone, cat",
            "chair:0.5, laptop:0.5, tv:0.4, tie:0.5, suitcase, handbag, dog, vase, potted plant, backpack",
        ),
        surfaces=(
            Surface(300, (186, 178, 214), (166, 158, 198), 3, (52, 0)),
            Surface(312, (236, 232, 244), (216, 210, 226), 2),
            Surface(512, (136, 126, 140), (112, 100, 118), 22),
        ),
        decor=("curtains", "lamp", "rug"),
        ground=(330, 506),
    ),
    Context(
        name="bathroom",
        phrase="in a bathroom",
        weights=_weights(
            1.4,
            "toilet:2.6, toothbrush:2, bottle:1.2, cup:1.2, scissors:0.8, potted plant:0.8",
            "cat:0.4, clock, cell phone, vase, book, chair:0.2, dog:0.2",
        ),
        surfaces=(
            Surface(320, (184, 222, 232), (160, 204, 218), 3, (32, 32)),
            Surface(512, (222, 228, 230), (188, 196, 200), 4, (56, 40)),
        ),
        decor=("mirror", "towel"),
        ground=(340, 504),
    ),
    Context(
        name="office",
        phrase="in an office",
        weights=_weights(
            1.9,
            "laptop:2, keyboard:1.8, mouse:1.8, chair:1.4, cup:1.2, cell phone:1.2, book, tie",
            "clock:0.6, scissors:0.6, potted plant:0.6, bottle:0.5, backpack:0.5, handbag, tv, donut, apple",
        ),
        surfaces=(
            Surface(280, (190, 200, 212), (172, 182, 196), 3),
            Surface(296, (96, 104, 116), (110, 118, 130), 2),
            Surface(512, (214, 206, 194), (184, 174, 160), 5),
        ),
        decor=("blinds", "board"),
        ground=(310, 504),
    ),
    Context(
        name="street",
        phrase="on a street",
        weights=_weights(
            2.4,
            "car:2.4, traffic light:1.6, bus:1.2, truck:1.2, bicycle:1.2, stop sign:1.1, motorcycle:1.1",
            "handbag:0.6, backpack:0.5, umbrella:0.6, dog, cell phone, bird:0.2, skateboard, potted plant:0.2",
        ),
        surfaces=(
            Surface(250, (150, 186, 222), (206, 220, 232), 2),
            Surface(310, (176, 172, 166), (158, 154, 148), 6, (40, 0)),
            Surface(512, (92, 92, 98), (70, 70, 76), 16),
        ),
        decor=("buildings", "lane"),
        ground=(300, 508),
    ),
    Context(
        name="station",
        phrase="at a railway station",
        weights=_weights(
            2.6,
            "train:2.8, suitcase:1.8, backpack:1.6, handbag:1.4, clock:1.2",
            "umbrella:0.5, cell phone:0.5, book:0.4, bottle:0.3, cup:0.4, tie:0.4, bicycle:0.3, dog, bird",
        ),
        surfaces=(
            Surface(96, (96, 108, 118), (122, 134, 142), 3, (64, 0)),
            Surface(270, (198, 206, 208), (178, 184, 186), 4),
            Surface(384, (120, 112, 106), (98, 90, 86), 26),
            Surface(404, (230, 200, 60), (220, 184, 44), 4),
            Surface(512, (168, 164, 160), (140, 136, 132), 6, (52, 36)),
        ),
        decor=("pillars", "rails"),
        ground=(340, 508),
    ),
    Context(
        name="farm",
        phrase="on a farm",
        weights=_weights(
            1.4,
            "cow:2, sheep:2, horse:1.8, dog, bird:0.8, truck:0.8",
            "cat:0.6, apple:0.4, car, carrot:0.4, bicycle:0.2, motorcycle:0.2, potted plant:0.2",
        ),
        surfaces=(
            Surface(220, (132, 184, 232), (200, 224, 240), 2),
            Surface(300, (128, 164, 76), (148, 176, 84), 12),
            Surface(512, (176, 158, 88), (146, 124, 62), 22),
        ),
        decor=("barn", "fence"),
        ground=(280, 508),
    ),
    Context(
        name="park",
        phrase="in a park",
        weights=_weights(
            2.2,
            "dog:1.8, bird:1.6, bicycle:1.2, frisbee:1.3, kite:1.1, skateboard:0.9",
            "sports ball:0.7, backpack:0.5, umbrella, book, sandwich, horse, bottle:0.4, teddy bear:0.2, cell phone",
        ),
        surfaces=(
            Surface(210, (146, 198, 236), (206, 230, 244), 2),
            Surface(512, (120, 180, 84), (84, 146, 56), 18),
        ),
        decor=("trees", "path"),
        ground=(270, 508),
    ),
    Context(
        name="beach",
        phrase="at the beach",
        weights=_weights(
            2.6,
            "surfboard:2.2, umbrella:1.6, boat:1.8, kite:1.2, bird:1.2, chair:0.7",
            "dog:0.5, handbag:0.5, frisbee:0.6, bottle:0.4, sports ball:0.4, book, backpack, cell phone:0.2",
        ),
        surfaces=(
            Surface(190, (112, 190, 240), (196, 228, 246), 2),
            Surface(310, (34, 128, 178), (84, 184, 204), 14, (0, 24)),
            Surface(512, (238, 216, 162), (222, 192, 132), 12),
        ),
        decor=("sun", "foam", "palm"),
        ground=(320, 508),
    ),
    Context(
        name="savanna",
        phrase="on a savanna",
        weights=_weights(
            0.5,
            "elephant:2.2, giraffe:2.2, zebra:2.2, bird:0.9, bear:0.8",
            "truck:0.4, car:0.4, airplane:0.3, horse:0.2, backpack:0.1, umbrella:0.1",
        ),
        surfaces=(
            Surface(240, (244, 170, 96), (250, 214, 150), 2),
            Surface(290, (186, 150, 84), (206, 168, 90), 10),
            Surface(512, (216, 178, 92), (184, 140, 66), 24),
        ),
        decor=("sun", "acacias"),
        ground=(270, 508),
    ),
    Context(
        name="sports field",
        phrase="on a sports field",
        weights=_weights(
            3.0,
            "sports ball:2.4, tennis racket:1.8, bottle:0.8, frisbee:0.8",
            "backpack:0.6, chair:0.5, clock:0.5, umbrella:0.3, hot dog:0.5, cup:0.4, skateboard, kite:0.2",
        ),
        surfaces=(
            Surface(70, (160, 198, 232), (190, 216, 238), 2),
            Surface(210, (120, 120, 140), (98, 98, 118), 60, (0, 20)),
            Surface(236, (40, 70, 140), (34, 60, 126), 2),
            Surface(512, (66, 158, 84), (48, 134, 68), 8),
        ),
        decor=("stripes", "lines"),
        ground=(290, 508),
    ),
    Context(
        name="snow",
        phrase="in the snow",
        weights=_weights(
            2.6,
            "skis:2.6, snowboard:2.2, backpack:1, dog:0.6",
            "bear:0.4, bird:0.3, cup:0.3, airplane:0.2, truck:0.3, horse:0.2, cell phone:0.2, car:0.3",
        ),
        surfaces=(
            Surface(230, (140, 176, 214), (206, 222, 236), 2),
            Surface(512, (238, 243, 248), (206, 218, 230), 8),
        ),
        decor=("mountains", "firs"),
        ground=(280, 508),
    ),
    Context(
        name="airfield",
        phrase="at an airfield",
        weights=_weights(
            1.8,
            "airplane:3, truck:1.4, suitcase:1.4, bus:1.1, car:0.9",
            "backpack:0.7, bird:0.5, handbag:0.4, motorcycle:0.2, umbrella, bicycle:0.2, cell phone, cup:0.2",
        ),
        surfaces=(
            Surface(250, (124, 172, 220), (204, 222, 236), 2),
            Surface(300, (138, 168, 92), (152, 176, 100), 12),
            Surface(512, (136, 138, 142), (112, 114, 118), 10, (110, 0)),
        ),
        decor=("tower", "lane"),
        ground=(300, 508),
    ),
)
