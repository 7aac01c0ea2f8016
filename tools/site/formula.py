"""Turns formulas into MathML when the site is built, so that pages need no script for them."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:  # noqa: ANN401
    """Converts a fenced block of LaTeX, as superfences calls it.

    Returns:
        HTML with one displayed formula.
    """
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'
