"""Render the world's sprite sheet from the Noto Color Emoji font.

    python -m tools.make_sprites /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

Writes `sprites.png` (one RGBA cell per glyph, cropped to its opaque pixels) and `sprites.json` (where the
cells lie, and the exact size of each sprite at every drawn size) to `vlmfix/world/assets`. On Debian the font
comes with the package fonts-noto-color-emoji. The sheet is a modified form of the font's glyphs and stays under the
SIL Open Font License in the `OFL.txt` beside it.
"""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vlmfix.world.categories import DRAWN
from vlmfix.world.sprites import ASSETS, SIZES, crop, resample

STRIKE = 109  # the only pixel size of the font's bitmaps
CELL = (136, 128)  # width and height of one bitmap
COLUMNS = 10

Picture = NDArray[np.uint8]

# A surfer and a snowboarder would show a person that nobody annotates: only their boards are kept.
BOARDS = {  # outlines in pixels of the bitmap: x,y
    "🏂": "33,105 50,101 65,99 88,88 98,80 105,78 111,80 113,86 110,93 100,99 85,103 63,111 50,119 43,122 "
    "36,120 32,113",
    "🏄": "21,108 30,94 46,81 62,73 76,69 93,65 106,64 107,69 98,79 85,91 62,107 43,116 30,118 22,115",
}


def glyph(font: ImageFont.FreeTypeFont, character: str) -> Picture:
    """Draw one character. Returns (128, 136, 4) uint8, RGBA."""
    cell = Image.new("RGBA", CELL, (0, 0, 0, 0))
    ImageDraw.Draw(cell).text((0, 0), character, font=font, embedded_color=True)
    picture = np.array(cell)
    if character in BOARDS:
        picture = board(picture, BOARDS[character])
    if character == "🎿":  # the snow under the boot is no part of the skis
        picture[picture[..., :3].min(axis=2) > 185] = 0
    if character in "🎾🎿":  # the ball beside the racket is another category
        picture = part(picture, largest=True)
    if character == "🍴":  # so is the knife beside the fork
        picture = part(picture, largest=False)
    return picture


def board(picture: Picture, outline: str) -> Picture:
    """Keep the board inside the outline and repair what legs cover from the point opposite its centre."""
    inside = np.zeros(picture.shape[:2], np.uint8)
    corners = [tuple(map(int, corner.split(","))) for corner in outline.split()]
    cv2.fillPoly(inside, [np.array(corners, np.int32)], 255)
    red, green, blue = (picture[..., channel].astype(int) for channel in range(3))
    leg = (red > 200) & (green > 110) & (green < 212) & (blue < 70)
    rows, columns = np.nonzero(inside)
    centre = rows.min() + rows.max(), columns.min() + columns.max()
    mended = picture.copy()
    for row, column in np.argwhere(leg & (inside > 0)):
        mended[row, column] = picture[centre[0] - row, centre[1] - column]
    mended[..., 3] = np.minimum(mended[..., 3], inside)
    return mended


def part(picture: Picture, *, largest: bool) -> Picture:
    """Keep one connected part of a glyph, the largest or the leftmost."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((picture[..., 3] > 60).astype(np.uint8))
    big = [label for label in range(1, len(stats)) if stats[label, cv2.CC_STAT_AREA] > 200]
    if largest:
        label = max(big, key=lambda label: stats[label, cv2.CC_STAT_AREA])
    else:
        label = min(big, key=lambda label: stats[label, cv2.CC_STAT_LEFT])
    near = cv2.dilate((labels == label).astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.where(near[..., None] > 0, picture, 0).astype(np.uint8)


def main(font_path: str) -> None:
    """Write the sheet and its index to the world's assets."""
    font = ImageFont.truetype(font_path, STRIKE)
    glyphs = [(entry.name, character) for entry in DRAWN for character in entry.glyphs]
    sheet = Image.new("RGBA", (COLUMNS * CELL[0], -(-len(glyphs) // COLUMNS) * CELL[1]), (0, 0, 0, 0))
    cells = []
    for number, (name, character) in enumerate(glyphs):
        picture = crop(glyph(font, character))
        x, y = number % COLUMNS * CELL[0], number // COLUMNS * CELL[1]
        sheet.paste(Image.fromarray(picture), (x, y))
        height, width = picture.shape[:2]
        drawn = [resample(picture, size).shape[1::-1] for size in SIZES]
        cells.append({"category": name, "glyph": character, "box": [x, y, x + width, y + height], "drawn": drawn})
    sheet.save(ASSETS / "sprites.png", optimize=True)
    lines = ",\n".join(json.dumps(cell, ensure_ascii=False) for cell in cells)
    (ASSETS / "sprites.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
