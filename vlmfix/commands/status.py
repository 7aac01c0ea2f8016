"""`vlmfix status`: how far a run over pictures is."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmfix.commands import options
from vlmfix.jobs.lines import ANSWERS, CARD, RAY
from vlmfix.jobs.shards import Shard, shards_in
from vlmfix.parsing import escaped, some

if TYPE_CHECKING:
    from vlmfix.jobs.status import Status

REASONS = 10
"""Most reasons of failures that are told; the rest are counted."""

STATES = ("running", "hung", "silent", "ended")
"""States of workers that share a run."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def status(folder: Path, as_json: bool) -> None:
    """Say how far the run that writes FOLDER is, or was when it ended: done, failed, left and how fast.

    It reads what vlmfix run has written, in another terminal or on another machine that has the folder, and changes
    nothing. Of shards that are not merged yet it tells each, and all together; of a run that is shared, each worker.
    """
    from vlmfix.jobs.blocks import BlockFolder
    from vlmfix.jobs.status import read_on_ray, read_shared, read_status, together
    from vlmfix.records import is_held

    merged = os.path.exists(folder / CARD)
    on_ray = os.path.isdir(folder / RAY) and (not merged or is_held(folder / ANSWERS))
    if on_ray or (not merged and BlockFolder(folder).is_there):
        shared = read_on_ray(folder) if on_ray else read_shared(folder)
        options.say_json(_json(shared)) if as_json else options.say("\n".join(_shared(shared)), lines=True)
        return
    shards = [] if merged else shards_in(folder)
    found = [read_status(shard.folder(folder)) for shard in shards] or [read_status(folder)]
    if not shards:
        (alone,) = found
        options.say_json(_json(alone)) if as_json else options.say("\n".join(_lines(alone)), lines=True)
        return
    count = max(shard.count for shard in shards)
    absent = [str(shard) for index in range(count) if (shard := Shard(index, count)) not in shards]
    whole = together(folder, found, absent=bool(absent))
    if as_json:
        parts = {str(shard): _json(one) for shard, one in zip(shards, found, strict=True)}
        options.say_json(_json(whole) | {"shards": parts, "absent": absent})
        return
    lines = [line for one in [*found, whole] for line in _lines(one)]
    lines += [f"  shards that have not begun: {some(absent)}"] if absent else []
    options.say("\n".join(lines), lines=True)


def _json(found: Status) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "state": _state(found),
        "answers": found.answers,
        "failed": found.failed,
        "reasons": found.reasons,
        "total": found.total,
        "left": found.left,
        "rate": None if found.rate is None else round(found.rate, 4),
        "rate_seconds": round(found.over),
        "seconds_left": None if found.seconds_left is None else round(found.seconds_left),
        "updated": found.updated or None,
        "workers": [asdict(worker) for worker in found.workers],
    }


def _shared(found: Status) -> list[str]:
    """Tells of a run that workers share: all together, those that have not ended, and how many have."""
    states = Counter(worker.state for worker in found.workers)
    lines = _lines(found)
    lines.append("  workers: " + ", ".join(f"{states[state]} {state}" for state in STATES))
    lines += [
        f"    {escaped(worker.name)}: {worker.state}, {worker.answers} answers and {worker.failed} failures, "
        f"heard of at {worker.updated}"
        for worker in found.workers
        if worker.state != "ended"
    ]
    return lines


def _state(found: Status) -> str:
    return "running" if found.running else "finished" if found.finished else "stopped"


def _lines(found: Status) -> list[str]:
    total = "an unknown number of" if found.total is None else str(found.total)
    left = "" if found.left is None else f", {found.left} left"
    lines = [
        f"{escaped(str(found.folder))}: {_state(found)}",
        f"  {found.answers} answers and {found.failed} failures, of {total} questions{left}",
    ]
    if found.rate is not None:
        lines.append(f"  {_speed(found)}")
    elif found.running:
        lines.append("  how fast is not known yet")
    counts = list(found.reasons.items())
    lines += [f"  {count} failed: {escaped(reason)}" for reason, count in counts[:REASONS]]
    if rest := counts[REASONS:]:
        lines.append(f"  {sum(count for _, count in rest)} failed for {len(rest)} other reasons")
    return lines


def _speed(found: Status) -> str:
    assert found.rate is not None
    over = timedelta(seconds=round(found.over))
    when = f"over the last {over}" if found.running else f"over the {over} before its card of {found.updated}"
    until = "" if found.seconds_left is None else f"; {timedelta(seconds=round(found.seconds_left))} left at this rate"
    return f"{found.rate:.2f} questions a second {when}{until}"
