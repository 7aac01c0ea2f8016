"""Holds a shared run to its promise: workers are killed, stopped and find the disk full, and nothing is lost or twice.

    python -m tools.promise --out /tmp/promise --pictures 100000 --workers 16 --kills 50
    python -m tools.promise --out /tmp/promise --pictures 500 --workers 2 --kills 5 --model tiny

Pictures are drawn when they are opened; one of a hundred is no picture. A stub answers them, or a model. Workers are
those of ``vlmfix run --steal``, each a process; they are started again when they end before their time, as queues do.
In the end their parts are merged, and every line is held against what it must be.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from ctypes import c_uint64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from vlmfix import images
from vlmfix.answering import Answerer, Asked, Failure, Item, Outcomes, Settling, asked
from vlmfix.card import Known
from vlmfix.decoders import parse
from vlmfix.errors import DataError, VlmfixError
from vlmfix.generation import Answer, load
from vlmfix.images import Found, Picture, picture_of
from vlmfix.jobs import blocks
from vlmfix.jobs.folder import Questions, job, merge_blocks, steal, worker
from vlmfix.jobs.folder.merge import merge
from vlmfix.jobs.lines import ANSWERS, FAILED
from vlmfix.records import read_lines
from vlmfix.settings import Settings
from vlmfix.sources import Source
from vlmfix.supply import Question

HOSTILE, WHICH = 100, 13
"""One of so many pictures is none, and which."""
SIZE = 8
"""Pixels of a picture's side."""
PROMPT = "What?"
FULL_SECONDS = 0.5
"""Time for which the disk is full at once."""
SLOTS = 1 << 16
"""Starts of workers, at most."""


@dataclass(frozen=True)
class Plan:
    """Says what is tried.

    Attributes:
        pictures: Number of pictures.
        workers: Processes at a time.
        kills: Times that a worker is killed.
        stalls: Times that a worker is stopped for longer than its lease.
        full: Times that the disk is full for all.
        lease: Seconds of a lease.
        rows: Rows of a batch.
        model: A model to answer in place of the stub; empty for that.
        seed: Seed of all chance.
    """

    pictures: int
    workers: int
    kills: int
    stalls: int = 0
    full: int = 0
    lease: float = 60.0
    rows: int = 32
    model: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Kept:
    """Says what came of it.

    Attributes:
        answers: Answers in the joined folder.
        failures: Failures in it.
        lost: Pictures that have neither.
        twice: Lines too many.
        wrong: Lines with the answer of another picture, failures of fine pictures, and answers about what is none.
        asked: Questions that workers put to their answerers altogether.
        kills: Workers that were killed.
        starts: Workers that were started.
        early: Workers that ended before their time, without having been killed.
        seconds: Time until the last worker had ended.
        merged: Time of the merge.
        peak: Most memory of this process, in bytes: it starts workers and merges.
    """

    answers: int
    failures: int
    lost: int
    twice: int
    wrong: int
    asked: int
    kills: int
    starts: int
    early: int
    seconds: float
    merged: float
    peak: int

    @property
    def repeated(self) -> float:
        """Share of the questions that were asked more than once."""
        return max(0.0, self.asked / max(1, self.lost + self.answers) - 1)


class Drawn(Source):
    """Lists pictures that nobody has drawn yet."""

    repeats = False

    def __init__(self, place: Path, count: int) -> None:
        super().__init__(place)
        self._count = count

    def __iter__(self) -> Iterator[Found]:
        """Yields the pictures in the order of their numbers."""
        return (Found(f"{number:09d}.png", self.place / f"{number:09d}.png") for number in range(self._count))


def colour(number: int) -> tuple[int, int, int]:
    """Returns the colour of a picture, by which its answer is known."""
    return number & 255, number >> 8 & 255, number >> 16 & 255


def said(prompt: str, found: tuple[int, ...]) -> str:
    """Returns what the stub says."""
    return f"{prompt} {found[0] | found[1] << 8 | found[2] << 16}"


def draw(file: Found) -> Picture:
    """Draws a picture, in place of ``open_found``.

    Raises:
        DataError: It is one of those that are none.
    """
    number = int(file.name[:9])
    if number % HOSTILE == WHICH:
        content = BytesIO()
        Image.new("RGB", (SIZE, SIZE)).save(content, "PNG")
        kinds = (b"", b"no picture", content.getvalue()[:-20], content.getvalue()[:30], bytes(1000))
        picture_of(kinds[number // HOSTILE % len(kinds)])
        raise DataError("it was read all the same")
    return Picture(Image.new("RGB", (SIZE, SIZE), colour(number)), f"{number:064x}")


class Stub(Settling):
    """Says of each picture which one it is."""

    rows = ahead = 1
    peak_memory = 0
    known = Known("stub", {}, "float32", {}, "cpu")

    def __init__(self, rows: int, count: Callable[[int], None]) -> None:
        super().__init__(parse("greedy"), "stub")
        self.rows = self.ahead = rows
        self._count = count

    def outcomes(self, batches: Iterable[Sequence[Asked[Item]]]) -> Generator[tuple[Sequence[Asked[Item]], Outcomes]]:
        """Answers at once."""
        for batch in batches:
            questions = asked(batch)
            self._count(len(questions))
            yield batch, iter([self.outcome(question) for question in questions])

    def outcome(self, question: Question) -> Answer | Failure:
        """Answers one."""
        assert question.picture is not None
        found = question.picture.getpixel((0, 0))
        assert isinstance(found, tuple)
        return Answer(said(question.prompt, tuple(map(int, found))), 1, "eos", 0.0, (5,))


def _work(plan: Plan, out: Path, full: Path, counts: Any, slot: int) -> None:  # noqa: ANN401 (a shared array)
    """Runs in each worker's process."""
    sys.stderr = open(out.parent / "workers.log", "a", buffering=1)
    blocks.LEASE_SECONDS = plan.lease
    images.open_found = draw
    job.__dict__["source_of"] = lambda place, **_: Drawn(place, plan.pictures)
    _fill(out, full)

    def count(questions: int) -> None:
        counts[slot] += questions

    if not plan.model:
        worker.__dict__["Answerer"] = lambda *_: Stub(plan.rows, count)
    else:
        part = Answerer.part

        def counted(self: Any, questions: Sequence[Question], *rest: Any) -> Any:  # noqa: ANN401
            count(len(questions))
            return part(self, questions, *rest)

        Answerer.part = counted  # type: ignore[method-assign,assignment]
    try:
        steal(
            out.parent,
            out,
            questions=Questions.text(PROMPT),
            settings=Settings(model=plan.model or "stub", max_new_tokens=8),
            batch_size=plan.rows,
            loader=load if plan.model else lambda *_, **__: None,  # type: ignore[arg-type]
        )
    except VlmfixError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _fill(out: Path, full: Path) -> None:
    """Lets whatever needs room below a folder fail while a file is there that says so."""
    write, below = os.write, str(out)

    def refused() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def written(file: int, content: Any) -> int:  # noqa: ANN401
        if not full.exists():
            return write(file, content)
        if len(content) > 1:
            write(file, content[: len(content) // 2])  # what still fits
        raise refused()

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" or (event == "open" and arguments[2] & os.O_CREAT):
            if str(arguments[0]).startswith(below) and full.exists():
                raise refused()

    os.write = written
    sys.addaudithook(check)


def keep(plan: Plan, out: Path, *, context: Any = None, report: Callable[[str], None] = lambda text: None) -> Kept:  # noqa: ANN401
    """Lets workers share a run through all that, merges what they wrote, and checks every line.

    Args:
        plan: What is tried.
        out: Folder of the run, beside which there is nothing yet.
        context: A context of multiprocessing whose processes have everything imported; None makes one.
        report: Called with words, every ten seconds.
    """
    if context is None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tools.promise"])
    out.mkdir(parents=True)
    full, begun, chance = out.parent / "full", time.monotonic(), random.Random(plan.seed)
    counts = context.RawArray(c_uint64, SLOTS)
    running: dict[int, Any] = {}
    starts = kills = early = 0
    stopped: list[tuple[float, int]] = []
    filled, told = 0.0, begun
    faults = sorted(
        (chance.uniform(0.02, 0.98) * plan.pictures, fault)
        for fault, times in (("kill", plan.kills), ("stall", plan.stalls), ("full", plan.full))
        for _ in range(times)
    )
    over = False
    while not over or running:
        time.sleep(0.01)
        now, done = time.monotonic(), sum(counts[:starts])
        for slot, process in list(running.items()):
            if process.exitcode is not None:
                del running[slot]
                over |= process.exitcode == 0
                early += process.exitcode > 0
                if early > (plan.full + 1) * plan.workers + plan.workers:
                    raise DataError(f"workers cannot begin; {out.parent / 'workers.log'} says why", "mend that")
        for until, slot in list(stopped):
            if now > until:
                stopped.remove((until, slot))
                if slot in running:
                    os.kill(running[slot].pid, signal.SIGCONT)
        if filled and now > filled:
            filled = 0.0
            full.unlink()
        while not over and not filled and len(running) < plan.workers:
            process = context.Process(target=_work, args=(plan, out, full, counts, starts), daemon=True)
            process.start()
            running[starts], starts = process, starts + 1
        while faults and done >= faults[0][0] and running:
            _, fault = faults.pop(0)
            slot = chance.choice(list(running))
            if fault == "kill":
                running[slot].kill()
                running.pop(slot).join()
                kills += 1
            elif fault == "stall" and not any(slot == other for _, other in stopped):
                os.kill(running[slot].pid, signal.SIGSTOP)
                stopped.append((now + 1.5 * plan.lease, slot))
            elif fault == "full":
                full.touch()
                filled = now + FULL_SECONDS
        if now - told > 10:
            told = now
            report(f"{done:,} of {plan.pictures:,} asked, {kills} killed, {early} ended early, {now - begun:.0f} s")
    seconds = time.monotonic() - begun
    begun, source_of = time.monotonic(), merge_blocks.__dict__["source_of"]
    merge_blocks.__dict__["source_of"] = lambda place, **_: Drawn(place, plan.pictures)
    try:
        merge(out)
    finally:
        merge_blocks.__dict__["source_of"] = source_of
    merged = time.monotonic() - begun
    answers, failures, lost, twice, wrong = _checked(plan, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Kept(
        answers, failures, lost, twice, wrong, sum(counts[:starts]), kills, starts, early, seconds, merged, peak
    )


def _checked(plan: Plan, out: Path) -> tuple[int, int, int, int, int]:
    """Counts answers, failures, pictures that have neither, lines too many, and lines that are not right."""
    times = bytearray(plan.pictures)
    found, twice, wrong = {ANSWERS: 0, FAILED: 0}, 0, 0
    for name in found:
        for line in read_lines(out / name):
            number = int(line["image"][:9])
            found[name] += 1
            twice += times[number] > 0
            times[number] = 1
            right = (number % HOSTILE == WHICH) == (name == FAILED)
            if name == ANSWERS and not plan.model:
                right = right and line["answer"] == said(PROMPT, colour(number))
            wrong += not right
    return found[ANSWERS], found[FAILED], times.count(0), twice, wrong
