"""COCO's 80 categories, and which of them the world can draw."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfix.errors import DataError


@dataclass(frozen=True)
class Category:
    """One COCO category.

    Attributes:
        id: COCO category id, 1 to 90 with gaps.
        name: COCO name, such as "dining table".
        supercategory: COCO supercategory, such as "furniture".
        plural: English plural of the name, such as "dining tables" or "sheep".
        glyphs: Emoji characters that show it, the usual one first; empty where the font has none.
    """

    id: int
    name: str
    supercategory: str
    plural: str
    glyphs: tuple[str, ...]

    @property
    def glyph(self) -> str | None:
        """The usual emoji character, None where the font has none."""
        return self.glyphs[0] if self.glyphs else None


# supercategory: (id, name, plural, emoji characters); an empty plural means name + "s"
_TABLE: dict[str, tuple[tuple[int, str, str, str], ...]] = {
    "person": ((1, "person", "people", "🧍🚶"),),
    "vehicle": (
        (2, "bicycle", "", "🚲"),
        (3, "car", "", "🚗🚙"),
        (4, "motorcycle", "", "🏍"),
        (5, "airplane", "", "✈"),
        (6, "bus", "buses", "🚌"),
        (7, "train", "", "🚆🚂"),
        (8, "truck", "", "🚚🚛"),
        (9, "boat", "", "⛵🚤"),
    ),
    "outdoor": (
        (10, "traffic light", "", "🚦"),
        (11, "fire hydrant", "", ""),
        (13, "stop sign", "", "🛑"),
        (14, "parking meter", "", ""),
        (15, "bench", "benches", ""),
    ),
    "animal": (
        (16, "bird", "", "🐦"),
        (17, "cat", "", "🐈"),
        (18, "dog", "", "🐕"),
        (19, "horse", "", "🐎"),
        (20, "sheep", "sheep", "🐑"),
        (21, "cow", "", "🐄"),
        (22, "elephant", "", "🐘"),
        (23, "bear", "", "🐻"),
        (24, "zebra", "", "🦓"),
        (25, "giraffe", "", "🦒"),
    ),
    "accessory": (
        (27, "backpack", "", "🎒"),
        (28, "umbrella", "", "☂"),
        (31, "handbag", "", "👜"),
        (32, "tie", "", "👔"),
        (33, "suitcase", "", "🧳"),
    ),
    "sports": (
        (34, "frisbee", "", "🥏"),
        (35, "skis", "skis", "🎿"),
        (36, "snowboard", "", "🏂"),
        (37, "sports ball", "", "⚽"),
        (38, "kite", "", "🪁"),
        (39, "baseball bat", "", ""),
        (40, "baseball glove", "", ""),
        (41, "skateboard", "", "🛹"),
        (42, "surfboard", "", "🏄"),
        (43, "tennis racket", "", "🎾"),
    ),
    "kitchen": (
        (44, "bottle", "", "🍾"),
        (46, "wine glass", "wine glasses", "🍷"),
        (47, "cup", "", "☕🥤"),
        (48, "fork", "", "🍴"),
        (49, "knife", "knives", "🔪"),
        (50, "spoon", "", "🥄"),
        (51, "bowl", "", "🍚"),
    ),
    "food": (
        (52, "banana", "", "🍌"),
        (53, "apple", "", "🍎"),
        (54, "sandwich", "sandwiches", "🥪"),
        (55, "orange", "", "🍊"),
        (56, "broccoli", "broccoli", "🥦"),
        (57, "carrot", "", "🥕"),
        (58, "hot dog", "", "🌭"),
        (59, "pizza", "", "🍕"),
        (60, "donut", "", "🍩"),
        (61, "cake", "", "🎂"),
    ),
    "furniture": (
        (62, "chair", "", "🪑"),
        (63, "couch", "couches", "🛋"),
        (64, "potted plant", "", "🪴"),
        (65, "bed", "", "🛏"),
        (67, "dining table", "", ""),
        (70, "toilet", "", "🚽"),
    ),
    "electronic": (
        (72, "tv", "", "📺"),
        (73, "laptop", "", "💻"),
        (74, "mouse", "mice", "🖱"),
        (75, "remote", "", ""),
        (76, "keyboard", "", "⌨"),
        (77, "cell phone", "", "📱"),
    ),
    "appliance": (
        (78, "microwave", "", ""),
        (79, "oven", "", ""),
        (80, "toaster", "", ""),
        (81, "sink", "", ""),
        (82, "refrigerator", "", ""),
    ),
    "indoor": (
        (84, "book", "", "📕📖"),
        (85, "clock", "", "🕒⏰"),
        (86, "vase", "", "🏺"),
        (87, "scissors", "scissors", "✂"),
        (88, "teddy bear", "", "🧸"),
        (89, "hair drier", "", ""),
        (90, "toothbrush", "toothbrushes", "🪥"),
    ),
}

CATEGORIES: tuple[Category, ...] = tuple(
    Category(id=number, name=name, supercategory=group, plural=plural or f"{name}s", glyphs=tuple(glyphs))
    for group, rows in _TABLE.items()
    for number, name, plural, glyphs in rows
)
DRAWN: tuple[Category, ...] = tuple(category for category in CATEGORIES if category.glyphs)

_BY_NAME = {category.name: category for category in CATEGORIES}


def category(name: str) -> Category:
    """Look a category up by its COCO name.

    Args:
        name: COCO name, such as "dining table".

    Returns:
        The category.

    Raises:
        DataError: No category has this name; the message lists the names.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise DataError(f"no COCO category is called {name!r}", hint=f"use one of: {', '.join(_BY_NAME)}") from None
