"""How reports say things: numbers, settings, and what an interval and a mark mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmfix.evals.comparison.compare import ALPHA, FEW_UNITS, Change, Comparison
from vlmfix.evals.comparison.seeds import Spread
from vlmfix.parsing import escaped
from vlmfix.settings import decoding_text

NONE = "-"
"""Stands for a figure without a value."""
SIGNS = {"better": "✓", "worse": "✗"}
SHIFTED = "†"
"""Behind a sign whose shift is clear as well."""
ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
LARGE = 10.0
"""From here on a figure is no share, and one decimal is enough."""


def value_text(change: Change, value: float | None) -> str:
    """A figure with the decimals that suit it."""
    return NONE if value is None else f"{_rounded(change, value):.{_decimals(change)}f}"


def difference_text(change: Change) -> str:
    """A difference with its sign."""
    return _signed(change, change.difference.value)


def interval_text(change: Change, *, space: str = " ") -> str:
    """The interval of a difference; empty when there is none."""
    low, high = change.difference.low, change.difference.high
    return "" if low is None else f"[{_signed(change, low)},{space}{_signed(change, high)}]"


def own_interval_text(change: Change, *, space: str = " ") -> str:
    """The interval of a figure itself; empty when there is none."""
    low, high = change.arm.low, change.arm.high
    return "" if low is None else f"[{value_text(change, low)},{space}{value_text(change, high)}]"


def spread_text(change: Change, spread: Spread, *, sign: str = "") -> str:
    """Mean and deviation over seeds, with the figure's decimals.

    Args:
        change: The figure.
        spread: What it is over the seeds.
        sign: ``+`` to write the sign of a mean above zero.
    """
    if spread.mean is None or spread.deviation is None:
        return NONE
    decimals = _decimals(change)
    return f"{round(spread.mean, decimals) + 0.0:{sign}.{decimals}f} ± {spread.deviation:.{decimals}f}"


def _signed(change: Change, value: float | None) -> str:
    return NONE if value is None else f"{_rounded(change, value):+.{_decimals(change)}f}"


def _rounded(change: Change, value: float) -> float:
    return round(value, _decimals(change)) + 0.0  # adding zero turns -0.0 into 0.0


def _decimals(change: Change) -> int:
    values = (estimate.value for estimate in (change.plain, change.arm))
    return 1 if any(value is not None and abs(value) >= LARGE for value in values) else 3


def mark(change: Change) -> str:
    """The sign of what is better or worse, with that of a shift that it may come from; empty for all else."""
    sign = SIGNS.get(change.direction, "")
    return f"{sign}{SHIFTED}" if sign and change.shifted else sign


def heading(comparison: Comparison) -> str:
    """What was measured, in one line."""
    card = comparison.card
    counted = f"{card['count']} samples about {_units(comparison)} {comparison.unit}"
    return escaped(f"{comparison.task}: {_model(card)}, {card['dtype']}, {decoding_text(card['decoding'])}, {counted}")


def _model(card: Mapping[str, Any]) -> str:
    version = card["commit"] or card["revision"]
    return f"{card['model']} ({version[:12]})" if version else str(card["model"])


def _units(comparison: Comparison) -> str:
    counts = [arm.units for arm in (comparison.arms or comparison.plain) if arm.units]
    return str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def legend(comparison: Comparison) -> list[str]:
    """How intervals and tests were made, what the marks mean and what else a reader must know, in sentences."""
    return [escaped(sentence) for sentence in _legend(comparison)]


def _legend(comparison: Comparison) -> list[str]:
    plain = comparison.plain[0].name if len(comparison.plain) == 1 else "the plain arm of the same run"
    changes = [change for arm in comparison.arms for change in arm.changes]
    merits = len({change.figure for change in changes if change.test})
    arms = f" and {len(comparison.arms)} arms (Bonferroni)" if len(comparison.arms) > 1 else ""
    shifts = ", ".join(dict.fromkeys(change.label for change in changes if change.kind == "shift"))
    shifted = any(change.shifted for change in changes)
    drawn = f"bootstrap over {_units(comparison)} {comparison.unit}, {comparison.draws} draws"
    if not comparison.arms:
        return [f"In brackets: 95 % intervals, {drawn}.", *_unparsed(comparison), *comparison.notes]
    return [
        f"In brackets: 95 % intervals, of the value for {plain}, else of the difference to it; paired {drawn}.",
        f"{SIGNS['better']} better, {SIGNS['worse']} worse: p < {ALPHA}, an interval without zero, and {FEW_UNITS} "
        f"{comparison.unit} or more; no mark: no clear difference.",
        f"p: the two arms' results swapped by {comparison.unit}, corrected for {merits} merits (Westfall and Young)"
        f"{arms}; where nothing differs, at most one comparison in twenty has a mark.",
        *([f"Shifts, not merits; a gain may come from them alone: {shifts}."] if shifts else []),
        *([f"{SHIFTED}: such a shift is beside it, with an interval without zero."] if shifted else []),
        *_unparsed(comparison),
        *_skipped(comparison),
        *(f"{a.name} is {a.spec}." for a in (*comparison.plain, *comparison.arms) if not a.name.endswith(a.spec)),
        *comparison.notes,
    ]


def _unparsed(comparison: Comparison) -> list[str]:
    counts = [f"{arm.name} {arm.unparsed}" for arm in (*comparison.plain, *comparison.arms) if arm.unparsed]
    return [f"Answers that could not be read, scored by the benchmark's rule: {', '.join(counts)}."] if counts else []


def _skipped(comparison: Comparison) -> list[str]:
    shares = [f"{arm.name} {100 * arm.skip_rate:.1f} %" for arm in comparison.arms if arm.skip_rate is not None]
    return (
        [f"Tokens that a contrast left to the clean row, which was sure of them: {', '.join(shares)}."]
        if shares
        else []
    )
