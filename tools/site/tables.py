"""Reads and writes tables of Markdown pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CELL = re.compile(r"(?<!\\)\|")
NAMED = re.compile(r"\[?`(?P<name>[^`]+)`(\]\([^)]*\))?")


@dataclass(frozen=True)
class Table:
    """Holds one table of a page.

    Attributes:
        under: The headings that it stands under, the outermost first.
        head: Names of its columns.
        rows: Its cells, line by line.
    """

    under: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def of(self, name: str) -> tuple[str, ...] | None:
        """Returns the row whose first cell is a name in code, linked or not; None where there is none."""
        for row in self.rows:
            found = NAMED.fullmatch(row[0])
            if found and found["name"] == name:
                return row
        return None


def tables(page: str) -> Iterator[Table]:
    """Reads the tables of a page, in order.

    Args:
        page: Markdown text.
    """
    headings: list[str] = []
    block: list[str] = []
    for line in [*page.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
            continue
        if len(block) > 2:
            head, _, *rows = (cells(one) for one in block)
            yield Table(tuple(headings), head, tuple(rows))
        block = []
        if heading := re.match(r"(#+) (.*)", line):
            headings = [*headings[: len(heading[1]) - 1], heading[2]]


def cells(line: str) -> tuple[str, ...]:
    """Cuts one line of a table into its cells."""
    return tuple(cell.strip() for cell in CELL.split(line.strip())[1:-1])


def written(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table.

    Args:
        head: Names of its columns.
        rows: Cells, which hold no bare ``|`` and no line break.
    """
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
