"""Comparisons for papers and browsers: LaTeX tables, and one HTML page with tables and plot."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from vlmfix import __version__
from vlmfix.evals.comparison.compare import Change, Comparison
from vlmfix.evals.comparison.seeds import Seeded
from vlmfix.figures import literally
from vlmfix.heads.plot import drawn as maps
from vlmfix.heads.profile import HeadProfile
from vlmfix.parsing import escaped
from vlmfix.reports.plots import drawn
from vlmfix.reports.tables import Row, Sheet, sheets
from vlmfix.reports.words import (
    difference_text,
    heading,
    interval_text,
    legend,
    mark,
    own_interval_text,
    spread_text,
    value_text,
)
from vlmfix.view.page import policy, style, template

NAME = "vlmfix compare"
PROFILES = "vlmfix profile"
"""Commands that make pages, by which these are known again."""
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
    "±": r"$\pm$",
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


@dataclass(frozen=True)
class Report:
    """What is said of an evaluation, wherever it is written.

    Attributes:
        task: Name of the benchmark.
        heading: What was measured, in one line.
        grids: The figures.
        legend: How to read them, in sentences.
        plot: A drawing of them, SVG; empty without one.
        drawn: What the drawing shows, for who cannot see it.
        name: The command that reports.
    """

    task: str
    heading: str
    grids: list[Grid]
    legend: list[str]
    plot: bytes = b""
    drawn: str = "Differences to plain decoding with their intervals; the same figures as above."
    name: str = NAME

    def latex(self) -> str:
        """Writes LaTeX tables, with the caption below the last."""
        caption = " ".join([f"{self.heading}.", *self.legend])
        text: str = _tex().render(name=NAME, version=__version__, sheets=self.grids, caption=caption)
        return text

    def page(self) -> str:
        """Makes an HTML page that needs nothing from elsewhere."""
        text: str = template("comparison.html.jinja").render(
            name=self.name,
            drawn=self.drawn,
            version=__version__,
            policy=policy(),
            style=style(),
            task=self.task,
            heading=self.heading,
            sheets=self.grids,
            plot=base64.b64encode(self.plot).decode(),
            legend=self.legend,
        )
        return text


def report_of(comparison: Comparison, *, draws: bool = False) -> Report:
    """Returns what is said of a comparison.

    Args:
        comparison: The comparison.
        draws: Adds the plot, where there are arms.
    """
    plot = b""
    if draws and comparison.arms:
        with literally():
            plot = _svg(drawn(comparison))
    return Report(comparison.task, heading(comparison), _grids(comparison, _cell), legend(comparison), plot)


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Creator": "vlmfix", "Date": None})
    return file.getvalue()


def profiles_report(profiles: Mapping[str, HeadProfile], count: int) -> Report:
    """Returns what is said of profiles of heads: where they come from, their strongest heads, and maps of all.

    Args:
        profiles: By name, at least one.
        count: How many heads of each.
    """
    rows = []
    for name, profile in profiles.items():
        card = profile.card
        reliable = "" if card.reliability is None else f", reliability of the ranking {card.reliability:.3f}"
        about = f"{name}: {card.model or card.model_type}, {card.pictures} pictures{reliable}"
        for rank, (layer, head) in enumerate(profile.top(min(count, profile.scores.numel()))):
            score, error = (float(part[layer, head]) for part in (profile.scores, profile.stderr))
            cells: list[Cell | None] = [
                Cell(f"{score:.4g}", "", ""),
                None if math.isnan(error) else Cell(f"{error:.2g}", "", ""),
            ]
            rows.append(Line(about, rank == 0, f"layer {layer}, head {head}", cells))
    first = next(iter(profiles.values())).card
    with literally():
        plot = _svg(maps(list(profiles.values())))
    return Report(
        "Heads",
        f"{first.layers} layers of {first.heads} heads",
        [Grid(["score", "standard error"], rows)],
        [f"The {count} strongest heads of each profile; the maps show all, a cell for each."],
        plot,
        "Maps of the scores, layers from the bottom up and heads from left to right.",
        PROFILES,
    )


def seeds_report(found: Seeded) -> Report:
    """Returns what is said of an evaluation with several seeds."""
    figures = {(arm, figure.first.figure): figure for arm, own in found.arms.items() for figure in own}

    def cell(row: Row, change: Change | None) -> Cell | None:
        if change is None:
            return None
        figure = figures[row.arm.name, change.figure]
        beside = "" if row.is_plain else spread_text(change, figure.difference, sign="+")
        return Cell(spread_text(change, figure.value), beside, "")

    plain = found.first.plain[0].name
    said = [
        f"Mean ± standard deviation (n - 1) over {len(found.seeds)} seeds ({', '.join(map(str, found.seeds))}); below "
        f"it that of the difference to {plain} with the same seed.",
        "How far seeds scatter says nothing of other pictures: compare one run for intervals and tests.",
    ]
    without_seed = {name: value for name, value in found.first.card["decoding"].items() if name != "seed"}
    first = replace(found.first, card=found.first.card | {"decoding": without_seed})
    return Report(found.first.task, heading(first), _grids(found.first, cell), said)


def _grids(comparison: Comparison, cell: Callable[[Row, Change | None], Cell | None]) -> list[Grid]:
    return [Grid([*sheet.merits, *sheet.shifts], list(_lines(sheet, cell))) for sheet in sheets(comparison)]


def _lines(sheet: Sheet, cell: Callable[[Row, Change | None], Cell | None]) -> Iterator[Line]:
    group = ""
    for row in sheet.rows:
        cells = [cell(row, row.cells.get(title)) for title in (*sheet.merits, *sheet.shifts)]
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


def report_table(report: Report) -> Iterator[Table | Text]:
    """Yields a report for the terminal."""
    yield Text(escaped(f"{report.heading}"), style="bold")
    for grid in report.grids:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for title in ("", *grid.titles):
            table.add_column(Text(title), overflow="fold")
        for row in grid.rows:
            if row.group_begins:
                table.add_row(Text(escaped(row.group), style="bold"))
            cells = ("" if cell is None else "\n".join(filter(None, (cell.value, cell.beside))) for cell in row.cells)
            table.add_row(Text(row.arm), *map(Text, cells))
        yield table
    for line in report.legend:
        yield Text(escaped(line))


def seeds_json(found: Seeded) -> dict[str, Any]:
    """Returns an evaluation with several seeds as JSON."""
    return {
        "task": found.first.task,
        "seeds": list(found.seeds),
        "arms": {
            arm: {
                figure.first.figure: {"value": asdict(figure.value), "difference": asdict(figure.difference)}
                for figure in figures
            }
            for arm, figures in found.arms.items()
        },
    }


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
