"""How reports say what changed between runs without a truth: a table for people, plain values for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vlmfix.view.changes import Changes

OFTEN = 8
"""Objects that are named in the table, those that changed most often."""
TO = "\N{RIGHTWARDS ARROW}"


def changes_table(found: Sequence[Changes]) -> list[RenderableType]:
    """Says of each column how it differs from the first.

    Args:
        found: What ``vlmfix.view.changes.changes`` gives.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in found:
        table.add_column(f"{column.before} {TO} {column.now}", overflow="fold")
    for name, values in _rows(found).items():
        table.add_row(name, *values)
    legend = (
        "Objects are COCO's, found in English answers as CHAIR finds them. Whether they are in the pictures is not "
        "known here: vlmfix view shows both, vlmfix eval measures it."
    )
    return [table, "", Text(legend)]


def changes_json(found: Sequence[Changes]) -> list[dict[str, Any]]:
    """The same in plain JSON values; objects by how often they changed."""
    return [
        asdict(column) | {"dropped": dict(column.dropped.most_common()), "added": dict(column.added.most_common())}
        for column in found
    ]


def _rows(found: Sequence[Changes]) -> dict[str, list[str]]:
    return {
        "answered by both": [str(column.answered) for column in found],
        "the same answer": [f"{column.same} ({_percent(column.same / column.answered)})" for column in found],
        "words in both answers": [_percent(column.shared) for column in found],
        "words per answer": [_pair(column.words, 1) for column in found],
        "longer, shorter": [f"{column.longer}, {column.shorter}" for column in found],
        "objects per answer": [_pair(column.objects, 2) for column in found],
        "objects dropped": [_listed(column.dropped) for column in found],
        "objects added": [_listed(column.added) for column in found],
        "cut off": [_pair(column.cut, 0) for column in found],
        "failed": [_pair(column.failed, 0) for column in found],
    }


def _pair(pair: tuple[float, float], decimals: int) -> str:
    return f"{pair[0]:.{decimals}f} {TO} {pair[1]:.{decimals}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _listed(objects: Counter[str]) -> str:
    named = ", ".join(f"{name} {count}" for name, count in objects.most_common(OFTEN))
    more = ", ..." if len(objects) > OFTEN else ""
    return f"{objects.total()}{f': {named}{more}' if named else ''}"
