"""Renders tables and texts for the terminal; needs no model and no torch."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from vlmfix.parsing import escaped

WIDTH = 110
"""Columns of a table that does not go to a terminal."""


class _Literal(Console):
    """Takes no text for markup, and shows control characters: names of models, files and arms come from elsewhere."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text, lines=True), segment.style)


def rendered(*parts: RenderableType) -> str:
    """Renders for the terminal's width, or for a fixed one where there is none; text is shown as it is."""
    terminal = sys.stdout.isatty()
    out = io.StringIO()
    width = None if terminal else WIDTH
    console = _Literal(file=out, width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part)
    return out.getvalue()
