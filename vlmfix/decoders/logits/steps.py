"""Declares in which steps a contrast acts: in all of them, or where the clean row is unsure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmfix.language.parameters import parameter


def steps(*idle: Mapping[str, Any]) -> Any:  # noqa: ANN401 (a field stands for its value)
    """A dataclass field ``when``: in which steps a contrast acts.

    Args:
        idle: Where it does nothing; see ``Range.idle``.
    """
    return parameter(
        "always",
        str,
        choices=("always", "uncertain"),
        later=True,
        idle=idle,
        help="steps in which it acts: all, or those whose best token leads by less than margin",
    )


def lead(*idle: Mapping[str, Any]) -> Any:  # noqa: ANN401 (a field stands for its value)
    """A dataclass field ``margin``: from which lead of the best token on a step is sure.

    Args:
        idle: Where it does nothing beside ``when=always``; see ``Range.idle``.
    """
    return parameter(
        0.8,
        float,
        low=0,
        high=1,
        later=True,
        idle=({"when": "always"}, *idle),
        help="lead of the best token over the second, in clean probability",
    )


def margin_of(when: str, margin: float) -> float | None:
    """Returns the margin of a rule (``Contrast.margin``) for the two parameters of its decoder."""
    return margin if when == "uncertain" else None
