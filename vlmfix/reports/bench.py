"""What a measurement found, as a table; it shows what the JSON file holds and computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

MIB, GIB = 2**20, 2**30
NOTHING = "-"

COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("first\nms", "first_ms", lambda value: _short(value)),
    ("x\nplain", "first_ratio", lambda value: f"{value:.2f}"),
    ("step\nms", "step_ms", lambda value: _short(value)),
    ("x\nplain", "step_ratio", lambda value: f"{value:.2f}"),
    ("tokens\n/s", "tokens_per_second", lambda value: f"{value:.0f}"),
    ("weights\n%", "weights_share", lambda value: f"{100 * value:.0f}"),
    ("MiB\n+weights", "memory_above_weights", lambda value: str(round(value / MIB))),
    ("MiB\nwhole", "memory", lambda value: str(round(value / MIB))),
    ("MiB\n+plain", "memory_above_plain", lambda value: str(round(value / MIB))),
    ("warm-up\ns", "warm_up_s", lambda value: f"{value:.2f}"),
)
"""Titles, the fields of a line that stand under them, and how they are written."""

LEGEND = (
    "first: to the first token of a call, pictures included; step: each further token of all rows; x plain: against "
    "plain decoding with as many rows (generate: that of transformers); tokens/s: the whole call; weights: share of a "
    "step that reading the text decoder's weights and the output's once would take; memory: the most that torch held, "
    "above the weights, whole, and above plain; warm-up: what the first call took longer.",
)


def bench_table(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The table of a measurement, under what was measured and over what could not be.

    Args:
        document: See ``vlmfix.bench.results.results``.
    """
    yield Text(_heading(document), style="bold")
    yield Text(_limit(document))
    yield ""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("decoder", overflow="fold")
    table.add_column("rows", justify="right")
    for title, _, _ in COLUMNS:
        table.add_column(title, justify="right")
    for line in document["lines"]:
        table.add_row(Text(line["arm"]), str(line["rows"]), *cells(line))
    yield table
    yield ""
    for text in (*_reasons(document), *_unfinished(document), *_skipped(document), *LEGEND):
        yield Text(text)


def cells(line: Mapping[str, Any]) -> list[str]:
    """The figures of a line, as written."""
    return [NOTHING if line[name] is None else write(line[name]) for _, name, write in COLUMNS]


def _short(milliseconds: float) -> str:
    """A time with about three digits."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.{1 if milliseconds >= 10 else 2}f}"


def _heading(document: Mapping[str, Any]) -> str:
    model, (width, height) = document["model"], document["picture"]
    what = f"{model['name']} ({model['layers']} layers, {model['dtype']}, weights: {model['weights']})"
    asked = f"a picture of {width} x {height} and a question, {document['prompt_tokens']} tokens"
    answered = f"answered with {document['tokens']}; medians of {document['rounds']} rounds"
    return f"{what} on {model['device']}: {asked}, {answered}"


def _limit(document: Mapping[str, Any]) -> str:
    rate, copied = document["bandwidth"]["median"], document["copied_bytes"]
    return (
        f"The device reads and writes {rate / 1e9:.4g} GB/s (a copy of {copied / GIB:g} GiB, measured in every round): "
        f"reading the {document['model']['step_bytes'] / GIB:.3g} GiB of a step's weights once takes "
        f"{_short(document['weights_ms'])} ms."
    )


def _reasons(document: Mapping[str, Any]) -> Iterator[str]:
    """Why lines have no figures; what holds for several is said once."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in document["lines"]:
        if line["reason"] is not None:
            found.setdefault(line["reason"], {}).setdefault(line["arm"], []).append(str(line["rows"]))
    for reason, arms in found.items():
        listed = ", ".join(f"{arm} ({', '.join(rows)})" for arm, rows in arms.items())
        yield f"{listed}: {reason}"


def _unfinished(document: Mapping[str, Any]) -> Iterator[str]:
    """Which medians are of fewer rounds because the time was over."""
    fewer = [
        f"{line['arm']} ({line['rows']}) {line['rounds']}"
        for line in document["lines"]
        if line["reason"] is None and line["rounds"] < document["rounds"]
    ]
    if fewer:
        yield f"The time was over; fewer rounds than {document['rounds']} have: {', '.join(fewer)}."


def _skipped(document: Mapping[str, Any]) -> Iterator[str]:
    """Of which decoders the branches acted in some steps alone."""
    shares = [
        f"{line['arm']} ({line['rows']}) {100 * line['skip_rate']:.1f} %"
        for line in document["lines"]
        if line["skip_rate"] is not None
    ]
    if shares:
        yield f"Tokens that a contrast left to the clean row, which was sure of them: {', '.join(shares)}."
