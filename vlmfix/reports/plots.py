"""Plots: differences to the plain arm with their intervals, and the trials of a search."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlmfix.evals.comparison.compare import Arm, Change, Comparison
from vlmfix.figures import literally, write
from vlmfix.parsing import escaped
from vlmfix.reports.words import SIGNS, heading

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people who see colours differently can tell apart; markers tell the arms apart as well."""
MARKERS = "osD^vPX"
WIDTH, DPI = 10.0, 100
"""Inches, and dots per inch: 1000 pixels."""
ACROSS = 3
"""Panels side by side."""
LEGEND = 130
"""Characters of the legend side by side."""
ROW = 0.17
"""Height of one interval, in inches."""
ROUNDING, NO_DIFFERENCE = 1e-9, 0.05
"""Differences below the first are rounding; where there are no others, the axis reaches so far to both sides."""
NAME = 34
"""Characters in a line of a trial's name."""
SHADE, GRID = "#e8f1ea", "#dddddd"

Side = Literal["higher", "lower"]


def differences(comparison: Comparison, path: Path) -> None:
    """Draws the differences of a comparison into a file; see ``drawn``.

    Args:
        comparison: What to draw.
        path: A PNG, PDF or SVG file; its folder must exist.

    Raises:
        DataError: The file cannot be written.
    """
    with literally():
        write(drawn(comparison), path)


@literally()
def drawn(comparison: Comparison) -> Figure:
    """Draws every merit and shift of every arm as its difference to the plain arm, with its 95 % interval.

    One panel per figure, since figures differ in scale and in their better side, which is shaded; in it one line per
    group. A filled marker is a clear difference, a hollow one is none.
    """
    panels: dict[str, dict[str, list[tuple[int, Change]]]] = {}
    for number, arm in enumerate(comparison.arms):
        for change in sorted(arm.changes, key=lambda change: change.kind):
            if change.kind != "other" and change.difference.value is not None:
                panels.setdefault(change.label, {}).setdefault(change.group, []).append((number, change))
    tallest = max(len(groups) for groups in panels.values()) * (len(comparison.arms) + 1)
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(WIDTH, down * (tallest * ROW + 1.0) + 1.0), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, (label, groups) in zip(axes, panels.items(), strict=False):
        _panel(axis, label, groups, len(comparison.arms))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    plain = " or ".join(escaped(arm.name) for arm in comparison.plain)
    reading = f"Differences to {plain} with 95 % intervals; filled: a clear difference, hollow: none"
    figure.suptitle(f"{escaped(heading(comparison))}\n{escaped(reading)}", fontsize=10)
    columns = max(1, LEGEND // (max(len(arm.name) for arm in comparison.arms) + 8))
    figure.legend(handles=_keys(comparison.arms), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _panel(axis: Axes, label: str, groups: Mapping[str, Sequence[tuple[int, Change]]], arms: int) -> None:
    """The differences of one figure, group by group from top to bottom."""
    ticks: dict[str, float] = {}
    for place, (group, found) in enumerate(groups.items()):
        ticks[escaped(group)] = -place * (arms + 1) - (arms - 1) / 2
        for number, change in found:
            _mark(axis, -place * (arms + 1) - number, change, number)
    better = next(change.better for found in groups.values() for _, change in found)
    axis.set_yticks(list(ticks.values()), [escaped(group) for group in ticks], fontsize=9)
    axis.set_ylim(-len(groups) * (arms + 1) + 0.5, 1.0)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.locator_params(axis="x", nbins=5)
    low, high = axis.get_xlim()
    if max(-low, high) < ROUNDING:
        low, high = -NO_DIFFERENCE, NO_DIFFERENCE
        axis.set_xlim(low, high)
    if better:
        axis.axvspan(*((0, high) if better == "higher" else (low, 0)), color=SHADE, zorder=0)
        axis.set_xlim(low, high)
    title = {
        "higher": f"{label}: better to the right →",
        "lower": f"← better to the left: {label}",
        "": f"{label} (shift)",
    }
    axis.set_title(title[better], fontsize=10, loc="left")


def _mark(axis: Axes, height: float, change: Change, number: int) -> None:
    difference, colour = change.difference, _colour(number)
    ends, value = (np.array(found, dtype=float) for found in ([difference.low, difference.high], [difference.value]))
    axis.plot(ends, [height, height], color=colour, linewidth=1.6)  # None becomes NaN, which is not drawn
    clear = change.direction in SIGNS if change.kind == "merit" else difference.leaves_out_zero
    axis.plot(
        value,
        [height],
        marker=_marker(number),
        color=colour,
        markerfacecolor=colour if clear else "white",
        markersize=6,
        linestyle="none",
    )


def _keys(arms: Sequence[Arm]) -> list[Line2D]:
    names = [escaped(arm.name) for arm in arms]
    names = [f" {name}" if name.startswith("_") else name for name in names]  # such a name would be left out
    return [Line2D([], [], color=_colour(n), marker=_marker(n), label=name) for n, name in enumerate(names)]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _marker(number: int) -> str:
    """Another one in every round of colours, so that the eighth arm is not drawn like the first."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


@dataclass(frozen=True)
class Point:
    """One trial of a search, or what it is measured against.

    Attributes:
        guard: The figure that must not suffer; x.
        objective: The figure that is searched for; y.
        feasible: Whether the guards allow it.
        role: A ``trial``, the ``chosen`` one, or ``plain`` decoding.
        name: Written beside the point; empty for none.
    """

    guard: float
    objective: float
    feasible: bool = True
    role: Literal["trial", "chosen", "plain"] = "trial"
    name: str = ""


def front(points: Sequence[Point], *, objective_better: Side, guard_better: Side) -> list[Point]:
    """The feasible points that no other feasible point beats in one figure without losing in the other.

    Args:
        points: In any order; plain decoding may be among them.
        objective_better: Better side of the objective.
        guard_better: Better side of the guard.

    Returns:
        Sorted by the guard, ascending; of equal points the first.
    """
    up, right = (1 if better == "higher" else -1 for better in (objective_better, guard_better))
    best, found = float("-inf"), []
    for point in sorted((p for p in points if p.feasible), key=lambda p: (-right * p.guard, -up * p.objective)):
        if up * point.objective > best:
            best = up * point.objective
            found.append(point)
    return sorted(found, key=lambda point: point.guard)


_STYLES: dict[str, dict[str, Any]] = {
    "infeasible trial": {"marker": "x", "color": "#888888", "markersize": 6},
    "feasible trial": {"marker": "o", "color": COLOURS[0], "markersize": 6},
    "plain decoding": {"marker": "s", "color": COLOURS[6], "markersize": 8},
    "chosen": {"marker": "*", "color": COLOURS[1], "markersize": 16},
}
"""How points are drawn, the last on top."""


def _label(point: Point) -> str:
    names = {"plain": "plain decoding", "chosen": "chosen", "trial": "feasible trial"}
    return names[point.role] if point.feasible or point.role != "trial" else "infeasible trial"


def _name(axis: Axes, point: Point) -> None:
    """Writes a point's name towards the middle of the plot."""
    left = point.guard < sum(axis.get_xlim()) / 2
    axis.annotate(
        textwrap.fill(escaped(point.name).replace(",", ", "), NAME),
        (point.guard, point.objective),
        xytext=(9 if left else -9, 8),
        textcoords="offset points",
        ha="left" if left else "right",
        fontsize=9,
    )


@literally()
def pareto(
    points: Sequence[Point],
    path: Path,
    *,
    objective: str,
    guard: str,
    objective_better: Side,
    guard_better: Side = "higher",
    limit: float | None = None,
    title: str = "",
) -> None:
    """Draw the trials of a search: what was gained against what it cost.

    Args:
        points: Trials, the chosen one and plain decoding.
        path: A PNG, PDF or SVG file; its folder must exist.
        objective: Name of the figure on y.
        guard: Name of the figure on x.
        objective_better: Better side of the objective.
        guard_better: Better side of the guard.
        limit: Value of the guard at which trials become infeasible; None draws no line.
        title: Above the plot.

    Raises:
        DataError: The file cannot be written.
    """
    figure = Figure(figsize=(WIDTH * 0.8, WIDTH * 0.55), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    best = front(points, objective_better=objective_better, guard_better=guard_better)
    axis.plot(
        [p.guard for p in best], [p.objective for p in best], color=COLOURS[0], linewidth=1.2, label="Pareto front"
    )
    for label, style in _STYLES.items():
        if drawn := [point for point in points if _label(point) == label]:
            axis.plot([p.guard for p in drawn], [p.objective for p in drawn], linestyle="none", label=label, **style)
    if limit is not None:
        axis.axvline(limit, color="black", linewidth=0.8, linestyle="--", label=f"limit of {guard}")
    arrows = {"higher": "higher is better", "lower": "lower is better"}
    for point in points:
        _name(axis, point)
    axis.set_xlabel(f"{guard} ({arrows[guard_better]})")
    axis.set_ylabel(f"{objective} ({arrows[objective_better]})")
    axis.set_title(escaped(title), fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=9)
    write(figure, path)
