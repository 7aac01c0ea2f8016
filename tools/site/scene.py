"""Draws the little scene that the pages of methods which change the picture show: a street with a small sign."""

from __future__ import annotations

from tools.site.drawing import rect, svg, text

WIDE, HIGH = 200, 140
SIGN = (118.0, 62.0, 26.0, 18.0)
"""Where the sign is: x, y, width, height."""
WINDOW = (100.0, 48.0, 60.0, 42.0)
"""What is cut out: x, y, width, height."""


def drawn() -> str:
    """Returns the shapes of the scene."""
    x, y, width, height = SIGN
    return "".join(
        [
            rect(0, 0, WIDE, 90, "sky"),
            rect(0, 90, WIDE, 50, "ground"),
            '<circle cx="168" cy="24" r="12" class="sun"/>',
            rect(14, 40, 58, 56, "house"),
            '<polygon points="8,40 43,14 78,40" class="roof"/>',
            rect(36, 66, 16, 30, "roof"),
            rect(x + width / 2 - 1.5, y + height, 3, 22, "post"),
            rect(x, y, width, height, "board", round_=2),
            text(x + width / 2, y + 13, "CAFE", "sign", anchor="middle"),
        ]
    )


def whole(title: str, *over: str) -> str:
    """Draws the scene with a title, and shapes over it."""
    placed = f'<g transform="translate(0 22)">{drawn()}{"".join(over)}</g>'
    return svg(WIDE, HIGH + 24, f"{title}: a house, the sun and a small sign", text(0, 14, title, "title"), placed)


def looked(title: str, weights: list[list[float]]) -> str:
    """Draws the scene under a map of how much each part of it is looked at, values in [0, 1], line by line."""
    wide, high = WIDE / len(weights[0]), HIGH / len(weights)
    cells = [
        f'<rect x="{column * wide:.1f}" y="{row * high:.1f}" width="{wide:.1f}" height="{high:.1f}" class="heat" '
        f'style="opacity:{0.85 * value:.2f}"/>'
        for row, values in enumerate(weights)
        for column, value in enumerate(values)
    ]
    return whole(title, *cells)


def window(title: str) -> str:
    """Draws what is cut out of the scene, enlarged to its size."""
    x, y, width, _ = WINDOW
    scale = WIDE / width
    inner = f'<g transform="scale({scale:.3f}) translate({-x:g} {-y:g})">{drawn()}</g>'
    placed = f'<svg x="0" y="22" width="{WIDE}" height="{HIGH}" viewBox="0 0 {WIDE} {HIGH}">{inner}</svg>'
    return svg(WIDE, HIGH + 24, f"{title}: the small sign, large", text(0, 14, title, "title"), placed)


def framed(title: str) -> str:
    """Draws the scene with a frame around what is cut out."""
    return whole(title, rect(*WINDOW, "frame"))
