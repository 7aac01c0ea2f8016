"""Draws the small pictures of the methods' pages as SVG, whose colours follow the page's light or dark scheme.

The classes of the shapes (``before``, ``after``, ``there``, ``absent``, ...) get their colours in ``docs/style.css``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

BAR = 17
"""Pixels between two bars of a row of attention."""


@dataclass(frozen=True)
class Group:
    """Names some neighbouring keys of a row of attention.

    Attributes:
        label: What stands below them.
        count: How many they are.
    """

    label: str
    count: int


def svg(width: float, height: float, label: str, *parts: str) -> str:
    """Makes one SVG element on one line.

    Args:
        width: Pixels; on narrower screens the drawing shrinks.
        height: Pixels.
        label: What it shows, for people who do not see it.
        parts: Its shapes.
    """
    size = f'viewBox="0 0 {width:g} {height:g}" style="width:{width:g}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def rect(x: float, y: float, width: float, height: float, kind: str, *, round_: float = 0) -> str:
    """Draws a rectangle."""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect {box} rx="{round_:g}" class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str = "", *, anchor: str = "start") -> str:
    """Writes one line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def line(x0: float, y0: float, x1: float, y1: float, kind: str, *, arrow: bool = False) -> str:
    """Draws a line, with a head at its end when it is an arrow."""
    drawn = f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'
    if not arrow:
        return drawn
    length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-6)
    dx, dy = 7 * (x1 - x0) / length, 7 * (y1 - y0) / length
    points = (
        f"{x1:.1f},{y1:.1f} {x1 - dx - dy / 2:.1f},{y1 - dy + dx / 2:.1f} {x1 - dx + dy / 2:.1f},{y1 - dy - dx / 2:.1f}"
    )
    return f'{drawn}<polygon points="{points}" class="{kind} head"/>'


def attention(before: Sequence[float], after: Sequence[float], groups: Sequence[Group], title: str) -> str:
    """Draws one row of attention before (wide, pale bars) and after (narrow bars).

    Args:
        before: A weight for each key.
        after: As many.
        groups: Names of neighbouring keys, all of them in order.
        title: What stands above.
    """
    left, top, tall = 6, 34, 120
    width = left * 2 + BAR * len(before)
    high = max(*before, *after)
    parts = [text(left, 14, title, "title")]
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        x = left + BAR * number
        for value, inset, kind in ((old, 1, "before"), (new, 5, "after")):
            size = tall * value / high
            parts.append(rect(x + inset, top + tall - size, BAR - 2 * inset, size, kind))
    start = 0
    for group in groups:
        x0, x1 = left + BAR * start + 1, left + BAR * (start + group.count) - 1
        parts += [
            line(x0, top + tall + 3, x1, top + tall + 3, "rule"),
            text((x0 + x1) / 2, top + tall + 17, group.label, "small", anchor="middle"),
        ]
        start += group.count
    y = top + tall + 36
    parts += [rect(left, y - 9, 12, 10, "before"), text(left + 17, y, "before", "small")]
    parts += [rect(left + 73, y - 9, 6, 10, "after"), text(left + 84, y, "after", "small")]
    return svg(width, top + tall + 44, f"{title}: attention to each token before and after", *parts)


def words(
    title: str, shares: Sequence[float | None], names: Sequence[str], there: Sequence[bool], *, gone: str = "cut"
) -> str:
    """Draws what a model says next: a bar for each word, the best in bold.

    Args:
        title: What stands above.
        shares: A probability for each word; None for one that is out.
        names: The words.
        there: Which of them the picture shows.
        gone: What is written for a word that is out.
    """
    width, left, tall = 206, 42, 22
    best = max(share for share in shares if share is not None)
    parts = [text(0, 14, title, "title")]
    for number, (share, name, shown) in enumerate(zip(shares, names, there, strict=True)):
        y = 24 + tall * number
        kind = "best" if share == best else ""
        parts.append(text(left - 6, y + 13, name, kind, anchor="end"))
        if share is None:
            parts.append(text(left, y + 13, gone, "small"))
            continue
        size = (width - left - 36) * share
        parts.append(rect(left, y + 2, max(size, 1), tall - 7, "there" if shown else "absent"))
        parts.append(text(left + size + 5, y + 13, f"{share:.0%}", f"small {kind}"))
    said = ", ".join(
        f"{name} {gone if share is None else f'{share:.0%}'}" for share, name in zip(shares, names, strict=True)
    )
    return svg(width, 30 + tall * len(names), f"{title}: {said}", *parts)


def heads(title: str, factors: Sequence[Sequence[float]]) -> str:
    """Draws the heads of a model as squares, a line for each layer, filled by the factor on their output.

    Args:
        title: What stands above.
        factors: By layer and head; 1 leaves a head as it is.
    """
    side, left = 19, 4
    width = left * 2 + side * len(factors[0])
    parts = [text(left, 14, title, "title")]
    for row, layer in enumerate(reversed(factors)):
        for column, factor in enumerate(layer):
            x, y = left + side * column, 24 + side * row
            parts.append(rect(x + 1, y + 1, side - 3, side - 3, "hollow", round_=2))
            if factor:
                kind = "before" if factor == 1 else "after"
                inset = 1.0 if factor >= 1 else 1 + (side - 3) * (1 - factor**0.5) / 2
                parts.append(rect(x + inset, y + inset, side - 1 - 2 * inset, side - 1 - 2 * inset, kind, round_=2))
    return svg(max(width, 130), 30 + side * len(factors), title, *parts)


def ladder(title: str, layers: int, marked: int, bucket: Sequence[int]) -> str:
    """Draws layers one above the other, the first below, and one whose output is read early.

    Args:
        title: What stands above.
        layers: How many there are.
        marked: The one that is read, counted from 0.
        bucket: Those that it was chosen among.
    """
    width, tall, left = 190, 13, 4
    parts = [text(0, 14, title, "title")]
    for number in range(layers):
        y = 24 + tall * (layers - 1 - number)
        kind = "after" if number == marked else "before" if number in bucket or number == layers - 1 else "hollow"
        parts.append(rect(left, y, 70, tall - 3, kind, round_=2))
        label = {marked: "read early", layers - 1: "last layer"}.get(number)
        if label:
            parts += [
                line(left + 70, y + 5, left + 98, y + 5, "rule", arrow=True),
                text(left + 103, y + 9, label, "small"),
            ]
    return svg(width, 30 + tall * layers, f"{title}: layer {marked + 1} of {layers} is read early", *parts)


def steps(title: str, paths: Sequence[tuple[str, Sequence[tuple[str, float]], bool]]) -> str:
    """Draws answers as rows of pieces with their probabilities, and the product at the end.

    Args:
        title: What stands above.
        paths: For each the name of who takes it, its pieces, and whether it is the best.
    """
    parts, y = [text(0, 14, title, "title")], 26
    for name, pieces, best in paths:
        parts.append(text(0, y + 12, name, "small"))
        x, whole = 0.0, 1.0
        for words_, share in pieces:
            size = 14 + 7.0 * len(words_)
            parts += [
                rect(x, y + 18, size, 24, "there" if best else "before", round_=4),
                text(x + size / 2, y + 34, words_, "inside" if best else "", anchor="middle"),
                text(x + size / 2, y + 56, f"{share:.0%}", "small", anchor="middle"),
            ]
            x, whole = x + size + 8, whole * share
        parts.append(text(x + 4, y + 34, f"= {whole:.0%}", "best" if best else ""))
        y += 72
    return svg(330, y, title, *parts)


def arrows(title: str, named: Sequence[tuple[str, tuple[float, float], tuple[float, float], str]]) -> str:
    """Draws vectors in a plane.

    Args:
        title: What stands above.
        named: For each its name, where it begins and ends (y upwards), and its class.
    """
    scale, x0, y0 = 100, 20, 190
    parts = [text(0, 14, title, "title")]
    for name, begin, end, kind in named:
        points = (x0 + scale * begin[0], y0 - scale * begin[1], x0 + scale * end[0], y0 - scale * end[1])
        parts += [line(*points, kind, arrow=True), text(points[2] + 8, points[3] + 4, name, "small")]
    return svg(320, 200, title, *parts)
