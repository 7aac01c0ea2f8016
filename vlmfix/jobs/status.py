"""Tells how far a run over pictures is from its folder alone, while another process may be writing there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.extras import need
from vlmfix.jobs.blocks import LEASE_SECONDS, BlockFolder
from vlmfix.jobs.lines import ACTOR, ACTORS, ANSWERS, CARD, FAILED, FAILURE, PROGRESS, QUESTIONS, RAY, ROWS
from vlmfix.records import count_lines, is_held, read_json, read_lines
from vlmfix.shapes import COUNT, FLAG, TIME, fields

RECENT = timedelta(minutes=5)
"""The last minutes, over which a rate is taken."""
SHORTEST = timedelta(seconds=10)
"""A batch is written all at once; over less time a rate would say nothing."""
SHOWN = fields(
    {"finished": FLAG, "updated": TIME, "totals": fields({"answers": COUNT, "failed": COUNT})}, {"progress": PROGRESS}
)


@dataclass(frozen=True)
class WorkerStatus:
    """Says what is known of one process that works, or has worked, on a run.

    Attributes:
        name: Its name, or that of the folder that it writes alone.
        state: ``running``; ``ended``; ``silent`` when it has neither ended nor given a sign of life lately; or ``hung``
            when it lives and has answered nothing for far longer than a batch takes.
        answers: Answers that it wrote.
        failed: Failures that it wrote.
        updated: When it last wrote how far it is.
    """

    name: str
    state: str
    answers: int
    failed: int
    updated: str


@dataclass(frozen=True)
class Status:
    """Says how far a run is.

    Attributes:
        folder: The run's folder.
        running: Whether a process holds the lock of its answers.
        finished: Whether every question was answered or failed, as the card says.
        answers: Answers that are written.
        failed: Failures that are written, pictures and single questions.
        reasons: Failures by their reasons, the most frequent first.
        total: Questions of the run when it was last begun; None where the card does not say.
        left: Questions that have neither answer nor failure; None where the total is not known.
        rate: Questions a second in the last minutes, or in those before the run ended; None where not known.
        over: Seconds that the rate is taken over; 0 without one.
        updated: When the card was last written; empty before the first card.
        workers: The processes that work or worked on it, as far as they are known.
    """

    folder: Path
    running: bool
    finished: bool
    answers: int
    failed: int
    reasons: dict[str, int]
    total: int | None
    left: int | None
    rate: float | None
    over: float
    updated: str
    workers: tuple[WorkerStatus, ...] = ()

    @property
    def seconds_left(self) -> float | None:
        """Returns the seconds until the end at this rate; None while nothing runs or the rate is not known."""
        return self.left / self.rate if self.running and self.left is not None and self.rate else None


def read_status(folder: Path, now: datetime | None = None) -> Status:
    """Reads how far the run in a folder is; it changes nothing there, and needs neither pictures nor a model.

    Args:
        folder: A folder that ``vlmfix run`` writes or wrote.
        now: The present time; None for the clock's.

    Raises:
        DataError: The folder is none of a run, or a file in it is damaged.
    """
    answers = folder / ANSWERS
    if not os.path.exists(folder / CARD) and not os.path.exists(answers):
        raise DataError(f"{folder} holds neither {CARD} nor {ANSWERS}", "give a folder that vlmfix run wrote")
    running = is_held(answers)
    card = read_json(folder / CARD, SHOWN) if os.path.exists(folder / CARD) else None
    reasons = Counter(line["reason"] for line in read_lines(folder / FAILED, FAILURE))
    written, failed = count_lines(answers), reasons.total()
    rate, over = _rate(card, written + failed, (now or datetime.now(UTC)) if running else None)
    progress = None if card is None else card.get("progress")
    return Status(
        folder,
        running,
        card is not None and card["finished"],
        written,
        failed,
        dict(reasons.most_common()),
        None if progress is None else progress["total"],
        _left(card, written + failed),
        rate,
        over,
        (updated := "" if card is None else card["updated"]),
        (WorkerStatus(folder.name, "running" if running else "ended", written, failed, updated),),
    )


def read_shared(folder: Path, now: datetime | None = None) -> Status:
    """Reads how far a run is that workers share (``--steal``), from their files alone.

    Args:
        folder: The run's folder.
        now: The present time; None for the clock's.

    Raises:
        DataError: A file is damaged.
    """
    blocks, time = BlockFolder(folder), now or datetime.now(UTC)
    cards = blocks.cards()
    numbers, end = blocks.planned()
    finished = blocks.finished()
    answers = settled = 0
    reasons: Counter[str] = Counter()
    for number in finished:
        counts = blocks.counts(number)
        answers += counts["answers"]
        reasons.update(counts["reasons"])
        settled += blocks.head(number)[1]
    for _, more, failures in blocks.in_progress():
        answers += more
        settled += more + failures.total()
        reasons.update(failures)
    workers = tuple(_worker(name, card, time) for name, card in cards.items())
    rates = [
        _rate({"progress": card}, card["totals"]["answers"] + card["totals"]["failed"], time)
        for card, worker in zip(cards.values(), workers, strict=True)
        if worker.state == "running" and card["sessions"]
    ]
    known = [rate for rate, _ in rates if rate is not None]
    planned = sum(blocks.head(numbers[-1])) if numbers else 0
    total = None if end is None else planned
    done = end is not None and all(number in finished or blocks.is_end(number) for number in numbers)
    return Status(
        folder,
        any(worker.state == "running" for worker in workers),
        done,
        answers,
        reasons.total(),
        dict(reasons.most_common()),
        total,
        None if total is None else max(0, total - settled),
        sum(known) if known and len(known) == len(rates) else None,
        max((over for _, over in rates), default=0.0),
        max((card["updated"] for card in cards.values()), default=""),
        workers,
    )


def read_on_ray(folder: Path, now: datetime | None = None) -> Status:
    """Reads how far a run on Ray is, from what it has written until now.

    Args:
        folder: The run's folder.
        now: The present time; None for the clock's.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: A file is damaged.
    """
    need("parquet")
    import pyarrow.parquet as parquet

    place, time, running = folder / RAY, now or datetime.now(UTC), is_held(folder / ANSWERS)
    reasons: Counter[str] = Counter()
    answers = total = 0
    with suppress(Exception):  # the plan is being written
        total = sum(parquet.read_metadata(path).num_rows for path in (place / QUESTIONS).glob("*.parquet"))
    for path in (place / ROWS).glob("*.parquet"):
        with suppress(Exception):  # it is being written
            for reason in parquet.read_table(path, columns=["failed"]).column("failed").to_pylist():
                answers += reason is None
                reasons.update(() if reason is None else (reason,))
    cards = {path.stem: read_json(path, ACTOR) for path in sorted((place / ACTORS).glob("*.json"))}
    workers = tuple(
        replace(_worker(name, card | {"ended": not running}, time), state="running" if running else "ended")
        for name, card in cards.items()
    )
    left = max(0, total - answers - reasons.total())
    return Status(
        folder,
        running,
        not running and total > 0 and left == 0,
        answers,
        reasons.total(),
        dict(reasons.most_common()),
        total or None,
        left if total else None,
        None,
        0.0,
        max((card["updated"] for card in cards.values()), default=""),
        workers,
    )


def _worker(name: str, card: dict[str, Any], now: datetime) -> WorkerStatus:
    silent = (now - _time(card["updated"])).total_seconds() > LEASE_SECONDS
    alive = "hung" if card.get("hung") else "running"
    state = "ended" if card["ended"] else "silent" if silent else alive
    return WorkerStatus(name, state, card["totals"]["answers"], card["totals"]["failed"], card["updated"])


def together(folder: Path, parts: Sequence[Status], *, absent: bool) -> Status:
    """Sums up the shards of a run.

    Args:
        folder: The folder that they have in common.
        parts: The state of each, at least one. The rate is that of those that run, if all of them have one.
        absent: Whether shards have not begun, whose questions nobody has counted.
    """
    reasons = Counter[str]()
    for part in parts:
        reasons.update(part.reasons)
    running = [part for part in parts if part.running]
    rates = [part.rate for part in running if part.rate is not None]
    totals = [part.total for part in parts if part.total is not None]
    left = [part.left for part in parts if part.left is not None]
    return Status(
        folder,
        bool(running),
        not absent and all(part.finished for part in parts),
        sum(part.answers for part in parts),
        sum(part.failed for part in parts),
        dict(reasons.most_common()),
        sum(totals) if len(totals) == len(parts) and not absent else None,
        sum(left) if len(left) == len(parts) and not absent else None,
        sum(rates) if running and len(rates) == len(running) else None,
        max((part.over for part in running), default=0.0),
        max(part.updated for part in parts),
        tuple(worker for part in parts for worker in part.workers),
    )


def _left(card: dict[str, Any] | None, done: int) -> int | None:
    """Returns the card's figure, which may be half a minute old, less what was written since."""
    if card is None or "progress" not in card:
        return None
    since: int = done - card["totals"]["answers"] - card["totals"]["failed"]
    return max(0, int(card["progress"]["left"]) - max(0, since))


def _rate(card: dict[str, Any] | None, done: int, now: datetime | None) -> tuple[float | None, float]:
    """Returns questions a second, and the seconds over which; of a run that has ended up to its last mark.

    Args:
        card: The run's card, if there is one.
        done: Lines that are written.
        now: The present time; None when nothing runs.
    """
    marks = [(_time(mark["time"]), int(mark["done"])) for mark in (card or {}).get("progress", {}).get("recent", ())]
    if not marks:
        return None, 0.0
    end, last = (now, done) if now is not None else marks[-1]
    begin, first = next(((time, count) for time, count in marks if end - time <= RECENT), marks[-1])
    if end - begin < SHORTEST or last < first:
        return None, 0.0
    seconds = (end - begin).total_seconds()
    return (last - first) / seconds, seconds


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
