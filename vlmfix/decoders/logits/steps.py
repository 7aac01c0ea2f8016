"""Declares in which steps a contrast acts: in all of them, or where the clean row is unsure."""

from __future__ import annotations

from typing import Any

from vlmfix.language.parameters import parameter


def steps() -> Any:  # noqa: ANN401 (a field stands for its value)
    """A dataclass field ``when``: in which steps a contrast acts."""
    return parameter(
        "always",
        str,
        choices=("always", "uncertain"),
        later=True,
        help="steps in which it acts: all, or those whose best token leads by less than margin",
    )


def lead() -> Any:  # noqa: ANN401 (a field stands for its value)
    """A dataclass field ``margin``: from which lead of the best token on a step is sure."""
    return parameter(
        0.8,
        float,
        low=0,
        high=1,
        later=True,
        help="for when=uncertain: lead of the best token over the second, in clean probability",
    )


def margin_of(when: str, margin: float) -> float | None:
    """Returns the margin of a rule (``Contrast.margin``) for the two parameters of its decoder."""
    return margin if when == "uncertain" else None
