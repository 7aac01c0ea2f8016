"""What the command line shows: progress on stderr, tables and comparisons as text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from vlmfix.card import reading_notes
from vlmfix.decoders.support import WORKS
from vlmfix.demo import Comparison, Described, counted
from vlmfix.generation import VLM, load
from vlmfix.insight.sinks import RESTING
from vlmfix.jobs.folder import Progress, Shared
from vlmfix.parsing import escaped
from vlmfix.reports.bench import bench_table
from vlmfix.terminal import rendered
from vlmfix.upstream.versions import remedy

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal to draw a bar on."""
RATE_SECONDS = 1.0
"""A batch is reported all at once; before this time a speed would say nothing."""
FORECAST = 3
"""Reports behind the one that begins a start from which its rate is told: the first batch, and two by which it goes."""
WORTH_SECONDS = 10.0
"""What is over sooner needs no forecast."""
LARGE_FILE = 1 << 25
"""Bytes from which the reading of a file is shown."""

BEFOREHAND = ("sampling", "own generate", "recorded steps")
"""Ways to run a decoder that `doctor` does not try, and says what was found of."""
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
    """Shows the progress of a folder's run, and a forecast of it; yields the function that it reports to."""
    forecast = Forecast()
    with counting("answers") as report:

        def show(progress: Progress) -> None:
            report(progress.done, progress.total)
            if words := forecast.of(progress):
                print(f"vlmfix: {words}", file=sys.stderr, flush=True)

        yield show


class Forecast:
    """Says once, after the first batches of a start, how long it will take and what it needs.

    The first batch is left out: it loads libraries, and may compile.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: list[tuple[float, int, int]] = []
        self._said = False

    def of(self, progress: Progress) -> str:
        """Returns the forecast when there is something to be said of a state, else nothing."""
        tokens = progress.totals.tokens
        if self._said or (self._marks and tokens == self._marks[-1][2]):  # a picture that cannot be read is no batch
            return ""
        self._marks.append((self._clock(), progress.done, tokens))
        if len(self._marks) <= FORECAST:
            return ""
        (begun, done_before, tokens_before), (now, *_) = self._marks[1], self._marks[-1]
        if now - begun < RATE_SECONDS:
            return ""
        self._said = True
        rate = (progress.done - done_before) / (now - begun)
        left = progress.total - progress.done
        if left / rate < WORTH_SECONDS:
            return ""
        batches = f"{len(self._marks) - 2} batches of {progress.batch_size}"
        return (
            f"forecast, by {batches}: {timedelta(seconds=round(left / rate))} for the {left:,} questions that are "
            f"left, {(tokens - tokens_before) / (now - begun):.0f} tokens/s, at most "
            f"{progress.peak_memory / 2**30:.1f} GiB of memory so far"
        )


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


def summary(end: Progress, out: Path, limit: int) -> str:
    """The last words of a run.

    Args:
        end: Its final state.
        out: Its folder.
        limit: Tokens that an answer may have.
    """
    totals = end.totals
    folder = escaped(str(out))
    lines = [f"vlmfix: {totals.answers} answers in {folder}/answers.jsonl"]
    if end.before:
        lines[0] += f", {min(end.before, totals.answers)} of them from before"
    if totals.failed:
        lines.append(f"vlmfix: {totals.failed} failures in {folder}/failed.jsonl; --retry-failed asks again")
    if totals.cut:
        were = "answer was" if totals.cut == 1 else "answers were"
        lines.append(f"vlmfix: {totals.cut:,} {were} cut at {limit} tokens (--max-new-tokens)")
    lines += [f"vlmfix: {escaped(note)}" for note in end.notes]
    if totals.ms_per_token is not None:
        speed = f"{totals.tokens} tokens, {totals.ms_per_token:.1f} ms per token"
        lines.append(f"vlmfix: {speed}; settings in {folder}/run.json")
        lines.append(f"vlmfix: to look at the answers beside the pictures: vlmfix view {folder}")
    return "\n".join(lines)


def shared_summary(end: Shared, out: Path) -> str:
    """The last words of a worker.

    Args:
        end: What it has done.
        out: The folder of the run.
    """
    totals, folder = end.progress.totals, escaped(str(out))
    failed = f", {totals.failed} failures" if totals.failed else ""
    lines = [f"vlmfix: this worker wrote {totals.answers} answers{failed}; {end.done} of {end.blocks} blocks are done"]
    lines += [f"vlmfix: {escaped(note)}" for note in end.progress.notes]
    if end.done >= end.blocks:
        lines.append(f"vlmfix: to join what all workers wrote: vlmfix merge {folder}")
    return "\n".join(lines)


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
        ("sink rate", _sink_rate(diagnosis["sinks"])),
    ):
        facts.add_row(name, value)
    notes = [Text(note) for note in (*reading_notes(diagnosis["checkpoint"]), *diagnosis["refused"])]
    ways = _ways(diagnosis["ways"], diagnosis["reach"])
    beforehand = list(_beforehand(diagnosis["support"]))
    return rendered(facts, *notes, "", ways, *beforehand, "", *_contracts(diagnosis)).rstrip("\n")


def _sink_rate(sinks: dict[str, Any]) -> str:
    """The share of heads that rest on the first token, or why nobody knows."""
    if sinks["rate"] is None:
        return f"not known: {sinks['reason']}"
    return f"{sinks['rate']:.0%} of heads give the first token over {RESTING:.0%} of their attention"


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


def _beforehand(support: dict[str, dict[str, str]]) -> Iterator[Text]:
    """What was found with tiny models of the family in ways that are not tried here."""
    found: dict[tuple[str, str], list[str]] = {}
    ways = dict.fromkeys(way for verdicts in support.values() for way in verdicts if way in BEFOREHAND)
    for name, verdicts in support.items():
        for way in ways:
            if verdicts[way] != WORKS:
                found.setdefault((way, verdicts[way]), []).append(name)
    if ways:
        yield Text("")
        but = ", but for:" if found else ""
        yield Text(f"With a tiny model of this family (docs/support.md), {', '.join(ways)} work{but}")
    for (way, verdict), names in found.items():
        yield Text(f"  {way} of {', '.join(names)}: {verdict}")


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
