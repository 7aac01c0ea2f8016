"""Comparisons for papers and browsers: LaTeX tables, and one HTML page with tables and plot."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlmfix import __version__
from vlmfix.evals.comparison.compare import Change, Comparison
from vlmfix.figures import literally
from vlmfix.parsing import escaped
from vlmfix.reports.plots import drawn
from vlmfix.reports.tables import Row, Sheet, sheets
from vlmfix.reports.words import difference_text, heading, interval_text, legend, mark, own_interval_text, value_text
from vlmfix.view.page import policy, style, template

NAME = "vlmfix compare"
TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "{}$&#_%"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "✓": r"$^{+}$",
    "✗": r"$^{-}$",
    "†": r"$^{\dagger}$",
}
"""What signs are in LaTeX."""
SIGNS = re.compile("|".join([*map(re.escape, TEX), r"(?<![\w.])-(?=\d)"]))
"""These, and the minus of a number."""


@dataclass(frozen=True)
class Cell:
    """One figure of one arm, in words.

    Attributes:
        value: The value.
        beside: Its interval; of an arm beside the plain one the difference with interval and mark.
        direction: As of ``Change``.
    """

    value: str
    beside: str
    direction: str


@dataclass(frozen=True)
class Line:
    """One arm in one group.

    Attributes:
        group: Name of the group; empty where there are none.
        group_begins: Whether it is the group's first arm.
        arm: Name of the arm.
        cells: By column; None without a figure.
    """

    group: str
    group_begins: bool
    arm: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Grid:
    """A table of figures.

    Attributes:
        titles: Of its columns.
        rows: Its lines.
    """

    titles: list[str]
    rows: list[Line]


def latex(comparison: Comparison) -> str:
    """Writes a comparison as LaTeX tables, with the caption below the last."""
    caption = " ".join([f"{heading(comparison)}.", *legend(comparison)])
    text: str = _tex().render(name=NAME, version=__version__, sheets=_grids(comparison), caption=caption)
    return text


def page(comparison: Comparison) -> str:
    """Makes an HTML page that needs nothing from elsewhere, with the tables and, where there are arms, the plot."""
    plot = io.BytesIO()
    if comparison.arms:
        with literally():
            drawn(comparison).savefig(plot, format="svg", metadata={"Creator": "vlmfix", "Date": None})
    text: str = template("comparison.html.jinja").render(
        name=NAME,
        version=__version__,
        policy=policy(),
        style=style(),
        task=comparison.task,
        heading=heading(comparison),
        sheets=_grids(comparison),
        plot=base64.b64encode(plot.getvalue()).decode(),
        legend=legend(comparison),
    )
    return text


def _grids(comparison: Comparison) -> list[Grid]:
    return [Grid([*sheet.merits, *sheet.shifts], list(_lines(sheet))) for sheet in sheets(comparison)]


def _lines(sheet: Sheet) -> Iterator[Line]:
    group = ""
    for row in sheet.rows:
        cells = [_cell(row, row.cells.get(title)) for title in (*sheet.merits, *sheet.shifts)]
        yield Line(row.group, bool(row.group) and row.group != group, escaped(row.arm.name), cells)
        group = row.group


def _cell(row: Row, change: Change | None) -> Cell | None:
    if change is None:
        return None
    value = value_text(change, change.arm.value)
    if row.is_plain:
        return Cell(value, own_interval_text(change), "")
    beside = f"{difference_text(change)} {interval_text(change)} {mark(change)}"
    return Cell(value, " ".join(beside.split()), change.direction)


@cache
def _tex() -> Any:  # noqa: ANN401 (jinja2's own type names no fields)
    environment = Environment(
        loader=PackageLoader("vlmfix.reports", "template"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters["tex"] = tex
    return environment.get_template("comparison.tex.jinja")


def tex(text: str) -> str:
    """Writes a text so that LaTeX shows it as it stands."""
    return SIGNS.sub(lambda found: TEX.get(found.group(), "$-$"), escaped(text))
