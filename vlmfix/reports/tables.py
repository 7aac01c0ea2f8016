"""Comparisons as tables: for the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from vlmfix.evals.comparison.compare import Arm, Change, Comparison, Estimate
from vlmfix.parsing import escaped
from vlmfix.records import to_json
from vlmfix.reports.words import (
    ARROWS,
    difference_text,
    heading,
    interval_text,
    legend,
    mark,
    own_interval_text,
    value_text,
)

CELL = 16
"""Columns of one figure in the terminal, gap included."""
NAME = 14
"""Least columns of an arm's name in the terminal."""
LONG = 40
"""Characters from which on an arm's name is shortened in the terminal."""
MARKUP = re.compile(r"[\\`*\[\]|~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")
"""What would be taken for Markdown or HTML."""
STYLES = {"better": "green", "worse": "red"}


@dataclass(frozen=True)
class Row:
    """One arm in one group of figures.

    Attributes:
        group: Its name; empty when the figures have no groups.
        arm: The arm, plain or not.
        cells: Its figures in that group, by the titles of their columns.
    """

    group: str
    arm: Arm
    cells: dict[str, Change]

    @property
    def is_plain(self) -> bool:
        """Whether this is what the others are compared with."""
        return self.arm.name == self.arm.plain


@dataclass(frozen=True)
class Sheet:
    """Rows that share their columns.

    Attributes:
        merits: Titles, with an arrow to the better side.
        shifts: Titles.
        rows: By group; the plain arm stands before those that are compared with it.
    """

    merits: list[str]
    shifts: list[str]
    rows: list[Row]


def sheets(comparison: Comparison) -> list[Sheet]:
    """Merits and shifts laid out as tables.

    Groups that have the same figures share a table; those with a single one, such as means, share the last table. What
    has no value in any arm is left out.
    """
    ordered = [
        arm
        for plain in comparison.plain
        for arm in (plain, *(arm for arm in comparison.arms if arm.plain == plain.name))
    ]
    groups: dict[str, dict[str, Change]] = {}
    for change in (c for arm in ordered for c in arm.changes if c.kind != "other" and c.arm.value is not None):
        groups.setdefault(change.group, {}).setdefault(change.label, change)
    alike: dict[frozenset[str], list[Change]] = {}
    overall: list[Change] = []
    for found in groups.values():
        alone = len(found) == 1 and len(groups) > 1
        (overall if alone else alike.setdefault(frozenset(found), [])).extend(found.values())
    parts = [_sheet(ordered, figures, by_group=True) for figures in alike.values()]
    return parts + ([_sheet(ordered, overall, by_group=False)] if overall else [])


def _sheet(arms: Sequence[Arm], figures: Sequence[Change], *, by_group: bool) -> Sheet:
    titles = {c.figure: escaped(f"{c.label if by_group else c.figure}{ARROWS[c.better]}") for c in figures}
    found = []
    for group in dict.fromkeys(change.group if by_group else "" for change in figures):
        for arm in arms:
            changes = (c for c in arm.changes if c.figure in titles and (c.group == group or not by_group))
            if cells := {titles[change.figure]: change for change in changes}:
                found.append(Row(escaped(group), arm, cells))
    merits, shifts = (
        list(dict.fromkeys(titles[c.figure] for c in figures if c.kind == kind)) for kind in ("merit", "shift")
    )
    return Sheet(merits, shifts, found)


@dataclass(frozen=True)
class Shown:
    """A comparison that rich can print, for any width of the terminal."""

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        labels = _labels([arm.name for arm in (*self.comparison.plain, *self.comparison.arms)])
        yield Text(escaped(heading(self.comparison)), style="bold")
        for sheet in sheets(self.comparison):
            yield ""
            yield from _tables(sheet, labels, options.max_width)
        yield ""
        short = [f"{label} stands for {escaped(name)}." for name, label in labels.items() if label != escaped(name)]
        for line in (*short, *legend(self.comparison)):
            yield Text(escaped(line))


def terminal(comparison: Comparison) -> Shown:
    """Tables for the terminal, with what is needed to read them; print them with rich.

    Each arm has two lines: value and difference to the plain arm with a mark where it is clear, then the difference's
    interval; the plain arm has its value and the interval of that. Where the figures do not fit side by side, the
    merits are split over several tables and the shifts stand in each of them.
    """
    return Shown(comparison)


def _labels(names: Sequence[str]) -> dict[str, str]:
    """What the terminal calls arms: a long specification is called by its decoders, where no other arm is."""
    short = {name: re.sub(r":[^+]*", "", name) if len(name) >= LONG else name for name in names}
    taken = Counter([*short.values(), *names])
    return {name: escaped(label if label == name or taken[label] == 1 else name) for name, label in short.items()}


def _tables(sheet: Sheet, labels: Mapping[str, str], width: int) -> Iterator[Table]:
    fitting = max(1, (width - NAME) // CELL - len(sheet.shifts))
    parts = max(1, -(-len(sheet.merits) // fitting))
    each = -(-len(sheet.merits) // parts)
    for part in range(parts):
        titles = sheet.merits[part * each : (part + 1) * each] + sheet.shifts
        room = max(NAME, width - CELL * len(titles)) - 1
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", max_width=room, overflow="fold")
        for title in titles:
            table.add_column(Text(title), min_width=CELL - 1)
        group = ""
        for row in sheet.rows:
            if row.group != group:
                group = row.group
                table.add_row(Text(escaped(group), style="bold"))
            table.add_row(
                _folded(escaped(labels[row.arm.name]), room), *(_cell(row, row.cells.get(title)) for title in titles)
            )
        yield table


def _cell(row: Row, change: Change | None) -> Text:
    if change is None:
        return Text("")
    value = value_text(change, change.arm.value)
    if row.is_plain:
        return Text(f"{value}\n{own_interval_text(change, space='')}")
    lines = f"{value} {difference_text(change)} {mark(change)}".rstrip() + f"\n{interval_text(change, space='')}"
    return Text(lines, style=STYLES.get(change.direction, ""))


def _folded(name: str, width: int) -> Text:
    """A name in lines, broken behind the signs that part a specification where that is possible."""
    lines = [""]
    for piece in re.split(r"(?<=[:+,/_=])", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return Text("\n".join(lines))


def markdown(comparison: Comparison) -> str:
    """Tables for a README or a paper, with a caption that says what was measured and how."""
    tables = [_markdown_table(sheet) for sheet in sheets(comparison)]
    caption = _escaped(" ".join([f"{heading(comparison)}.", *legend(comparison)]))
    return "\n\n".join([*tables, caption]) + "\n"


def _markdown_table(sheet: Sheet) -> str:
    grouped = any(row.group for row in sheet.rows)
    titles = [*sheet.merits, *sheet.shifts]
    lines = [["group"] * grouped + ["arm", *map(_escaped, titles)], ["---"] * (grouped + 1 + len(titles))]
    group = ""
    for row in sheet.rows:
        cells = [_code(row.arm.name), *(_markdown_cell(row, row.cells.get(title)) for title in titles)]
        lines.append([_escaped(row.group) if row.group != group else ""] * grouped + cells)
        group = row.group
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    """Text as text in Markdown, also in a table's cell; an underscore within a word means nothing there."""
    return MARKUP.sub(r"\\\g<0>", escaped(text))


def _code(text: str) -> str:
    """Text as code in a table's cell, between more backticks than it has in a row."""
    text = escaped(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _markdown_cell(row: Row, change: Change | None) -> str:
    if change is None:
        return ""
    value = value_text(change, change.arm.value)
    if row.is_plain:
        return f"{value}<br>{own_interval_text(change)}"
    return f"{value}<br>{difference_text(change)} {interval_text(change)} {mark(change)}".rstrip()


def csv_text(comparison: Comparison) -> str:
    """One line per arm and figure, with every number at full precision; empty for what has no value."""
    out = io.StringIO()
    lines = [_line(comparison, arm, change) for arm in (*comparison.plain, *comparison.arms) for change in arm.changes]
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _line(comparison: Comparison, arm: Arm, change: Change) -> dict[str, str | int | float | None]:
    is_plain = arm.name == arm.plain
    nothing = Estimate(None, None, None)
    estimates = {
        "value": change.arm,
        "plain": change.plain,
        "difference": nothing if is_plain else change.difference,
    }
    return {
        "task": comparison.task,
        "folder": escaped(arm.folder),
        "arm": escaped(arm.name),
        "spec": escaped(arm.spec),
        "plain_arm": escaped(arm.plain),
        "group": escaped(change.group),
        "figure": change.label,
        "kind": change.kind,
        "better": change.better,
        **{
            f"{name}{end}": value
            for name, estimate in estimates.items()
            for end, value in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high))
        },
        "direction": change.direction,
        "shifted": " ".join(change.shifted),
        "test": change.test,
        "p": change.p,
        "p_corrected": change.corrected,
        "samples": arm.compared,
        "units": arm.units,
        "failed": arm.failed,
        "missing": arm.missing,
        "unparsed": arm.unparsed,
        "skip_rate": arm.skip_rate,
        "draws": comparison.draws,
        "seed": comparison.seed,
    }


def json_text(comparison: Comparison) -> str:
    """The whole comparison as JSON, for programs."""
    return to_json(asdict(comparison), indent=2) + "\n"
