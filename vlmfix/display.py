"""What the command line shows: progress on stderr, tables and comparisons as text."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from vlmfix.card import plain, reading_notes
from vlmfix.decoders import DecoderInfo
from vlmfix.demo import Comparison, Described, counted
from vlmfix.generation import VLM, load
from vlmfix.jobs.folder import Progress
from vlmfix.language.parameters import written
from vlmfix.parsing import escaped
from vlmfix.reports.bench import bench_table
from vlmfix.upstream.versions import remedy

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal to draw a bar on."""
RATE_SECONDS = 1.0
"""A batch is reported all at once; before this time a speed would say nothing."""
WIDTH = 110
"""Columns of a table that does not go to a terminal."""

LARGE_FILE = 1 << 25
"""Bytes from which the reading of a file is shown."""

STYLES = {"": "", "present": "bold", "absent": "bold red strike"}


def loading(model: str, **how: Any) -> VLM:
    """Loads a model, and says so and how its files were read."""
    print(f"vlmfix: loading {escaped(model)}", file=sys.stderr, flush=True)
    vlm = load(model, **how)
    for note in reading_notes(vlm.reading):
        print(f"vlmfix: {escaped(note)}", file=sys.stderr, flush=True)
    return vlm


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far a job is, on stderr: a bar on a terminal, else a line now and then.

    Args:
        what: What is counted, in the plural.

    Yields:
        A function to call with the number done and the total.
    """
    first: list[tuple[int, float]] = []
    with _bar() if sys.stderr.isatty() else _lines() as show:

        def report(done: int, total: int) -> None:
            now = time.monotonic()
            first.append((done, now)) if not first else None
            before, started = first[0]
            rate = (done - before) / (now - started) if now - started > RATE_SECONDS else 0.0
            show(what, done, total, rate)

        yield report


@contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far the first read of large files is; small ones pass unseen.

    Args:
        what: What is read.

    Yields:
        A function to call with the bytes read of a file and its size.
    """
    with ExitStack() as shown:
        bars: dict[int, Callable[[int, int], None]] = {}

        def report(done: int, total: int) -> None:
            if total < LARGE_FILE:
                return
            if total not in bars:
                bars[total] = shown.enter_context(counting(f"MB of {what}"))
            bars[total](done >> 20, total >> 20)

        yield report


@contextmanager
def run_display() -> Iterator[Callable[[Progress], None]]:
    """Shows the progress of a folder's run; yields the function that it reports to."""
    with counting("answers") as report:
        yield lambda progress: report(progress.done, progress.total)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int, float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def show(what: str, done: int, total: int, rate: float) -> None:
            if not bar.task_ids:
                bar.add_task(what, total=total, completed=done, rate="")
            bar.update(bar.task_ids[0], completed=done, total=total, rate=f"{rate:.2f}/s" if rate else "")

        yield show


@contextmanager
def _lines() -> Iterator[Callable[[str, int, int, float], None]]:
    last = [time.monotonic()]

    def show(what: str, done: int, total: int, rate: float) -> None:
        now = time.monotonic()
        if now - last[0] < LINE_SECONDS and done < total:
            return
        last[0] = now
        speed = f", {rate:.2f}/s" if rate > 0 else ""
        left = f", {timedelta(seconds=round((total - done) / rate))} left" if rate > 0 and done < total else ""
        print(f"vlmfix: {done} of {total} {what}{speed}{left}", file=sys.stderr, flush=True)

    yield show


def summary(end: Progress, out: Path) -> str:
    """The last words of a run."""
    totals = end.totals
    folder = escaped(str(out))
    lines = [f"vlmfix: {totals.answers} answers in {folder}/answers.jsonl"]
    if end.before:
        lines[0] += f", {min(end.before, totals.answers)} of them from before"
    if totals.failed:
        lines.append(f"vlmfix: {totals.failed} failures in {folder}/failed.jsonl; --retry-failed asks again")
    if totals.ms_per_token is not None:
        speed = f"{totals.tokens} tokens, {totals.ms_per_token:.1f} ms per token"
        lines.append(f"vlmfix: {speed}; settings in {folder}/run.json")
        lines.append(f"vlmfix: to look at the answers beside the pictures: vlmfix view {folder}")
    return "\n".join(lines)


def decoder_table(infos: Sequence[DecoderInfo]) -> str:
    """Decoders, one in a line as far as the width allows, and where to read on."""
    table = Table(box=None, pad_edge=False)
    for title in ("decoder", "title", "acts on", "passes", "beams", "arXiv"):
        table.add_column(title, justify="right" if title == "passes" else "left")
    for info in infos:
        beams = "yes" if info.beams else "no"
        table.add_row(info.name, info.title, info.acts_on, str(info.passes), beams, info.arxiv)
    return rendered(table, "", Text("Parameters and presets: vlmfix decoders NAME; of all: vlmfix decoders --all"))


def decoder_pages(infos: Sequence[DecoderInfo]) -> str:
    """What each of some decoders does, with its parameters and presets."""
    parts: list[RenderableType] = []
    for info in infos:
        parts += [*([""] if parts else []), *_decoder_page(info)]
    return rendered(*parts)


def _decoder_page(info: DecoderInfo) -> Iterator[RenderableType]:
    links = [f"arXiv {info.arxiv}" if info.arxiv else "", info.code]
    source = "; ".join(filter(None, links))
    yield Text(f"{info.name}: {info.title}{f' ({source})' if source else ''}", style="bold")
    yield Text(info.summary)
    works = ", ".join(f"{what} {'works' if flag else 'does not work'}" for what, flag in _abilities(info))
    yield Text(f"Acts on: {info.acts_on}. Rows per sample: {info.passes}. {works[0].upper()}{works[1:]}.")
    if info.parameters:
        table = Table(box=None, pad_edge=False)
        for title in ("parameter", "default", "allowed", "meaning"):
            table.add_column(title)
        for parameter in info.parameters:
            table.add_row(parameter.name, written(parameter.default), parameter.range, parameter.help)
        yield from ("", table)
    for name, values in info.presets.items():
        yield Text(f"preset={name}: {', '.join(f'{key}={written(value)}' for key, value in values.items())}")


def _abilities(info: DecoderInfo) -> tuple[tuple[str, bool], ...]:
    return ("beam search", info.beams), ("compiled decoding", info.compiles)


def info_json(info: DecoderInfo) -> dict[str, Any]:
    """A decoder's description in plain JSON values."""
    return {
        "name": info.name,
        "title": info.title,
        "summary": info.summary,
        "arxiv": info.arxiv,
        "code": info.code,
        "acts_on": info.acts_on,
        "passes": info.passes,
        "beams": info.beams,
        "compiles": info.compiles,
        "parameters": [
            {
                "name": parameter.name,
                "default": plain(parameter.default),
                "range": parameter.range,
                "search": parameter.search,
                "help": parameter.help,
            }
            for parameter in info.parameters
        ],
        "presets": {name: {key: plain(v) for key, v in values.items()} for name, values in info.presets.items()},
    }


def diagnosis_text(diagnosis: dict[str, Any]) -> str:
    """What ``doctor`` found, in lines."""
    machine, model = diagnosis["machine"], diagnosis["model"]
    memory = f"{machine['memory_available'] / 2**30:.1f} of {machine['memory'] / 2**30:.1f} GiB free"
    gpus = [f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB ({gpu['device']})" for gpu in machine["gpus"]]
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in (
        ("system", machine["system"]),
        ("memory", f"{machine['cores']} cores, {memory}"),
        ("GPU", "; ".join(gpus) or "none that torch sees"),
        ("versions", ", ".join(f"{name} {number}" for name, number in diagnosis["versions"].items())),
        ("model", f"{model['id']}: {model['family']}, {model['layers']} layers"),
        ("runs on", f"{model['device']}, {model['dtype']}"),
    ):
        facts.add_row(name, value)
    notes = [Text(note) for note in reading_notes(diagnosis["checkpoint"])]
    ways = _ways(diagnosis["ways"], diagnosis["reach"])
    return rendered(facts, *notes, "", ways, "", *_contracts(diagnosis)).rstrip("\n")


def _ways(ways: dict[str, dict[str, str | None]], reach: dict[str, int | None]) -> Table:
    """Decoders by the ways of running them; one that does not work at all says why in their place."""
    table = Table(box=None, pad_edge=False)
    for title in ("decoder", *next(iter(ways.values())), "why not"):
        table.add_column(title, overflow="fold")
    for name, found in ways.items():
        reasons = list(dict.fromkeys(reason for reason in found.values() if reason))
        works = "works" if reach[name] is None else f"works up to {reach[name]} tokens"
        table.add_row(name, *(works if reason is None else "no" for reason in found.values()), "; ".join(reasons))
    return table


def _contracts(diagnosis: dict[str, Any]) -> Iterator[Text]:
    """What vlmfix builds on: one line when all of it holds, else a line for each point that does not."""
    found = diagnosis["contracts"]
    broken = [finding for finding in found if finding["reason"] is not None]
    if diagnosis["untested"]:
        yield Text(f"not among the versions tested: {', '.join(diagnosis['untested'])}")
    yield Text(f"{len(found) - len(broken)} of {len(found)} things that vlmfix builds on are as it needs them")
    for finding in broken:
        yield Text(f"  {finding['name']}: {finding['reason']}")
        yield Text(f"    without it do not work: {', '.join(finding['protects'])}")
    if broken:
        yield Text(f"To repair it, {remedy()}")


def bench_text(document: dict[str, Any]) -> str:
    """What was measured of decoders' cost, as a table with what is needed to read it."""
    return rendered(*bench_table(document))


def comparison_text(comparison: Comparison) -> str:
    """The answers side by side, with the objects that are not there marked, and the counts."""
    table = Table(show_lines=True)
    table.add_column("picture")
    for spec in comparison.counts:
        table.add_column(spec, ratio=1)
    for scene in comparison.scenes:
        present = Text(f"{scene.image.name}\n").append(", ".join(scene.present), style="dim")
        table.add_row(present, *(_marked(described) for described in scene.answers.values()))
    legend = Text("[in brackets]: not in the picture")
    return rendered(
        table, legend, "", *(Text(f"{spec}: {'; '.join(counted(count))}") for spec, count in comparison.counts.items())
    )


def _marked(described: Described) -> Text:
    text = Text()
    for words, mark in described.pieces:
        text.append(f"[{words}]" if mark == "absent" else words, style=STYLES[mark])
    return text


class _Literal(Console):
    """Takes no text for markup, and shows control characters: names of models, files and arms come from elsewhere."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text, lines=True), segment.style)


def rendered(*parts: RenderableType) -> str:
    """Renders for the terminal's width, or for a fixed one where there is none; text is shown as it is."""
    terminal = sys.stdout.isatty()
    out = io.StringIO()
    width = None if terminal else WIDTH
    console = _Literal(file=out, width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part)
    return out.getvalue()
