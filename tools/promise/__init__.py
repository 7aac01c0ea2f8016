"""Holds a shared run to its promise: workers die, hang and find the disk full, and nothing is lost or twice.

    python -m tools.promise --out /tmp/promise --pictures 100000 --workers 16 --kills 50
    python -m tools.promise --out /tmp/promise --pictures 500 --workers 2 --kills 5 --model tiny

Pictures are drawn when they are opened; one of a hundred is no picture, and some are poison: the process that opens or
answers one dies, whichever it is. A stub answers them, or a model. Workers are those of ``vlmfix run --steal``, each a
process; they are started again when they end before their time, as queues do. Some are killed, some are stopped, and
some hang: the thread that answers stands still, the one that gives signs of life does not. In the end their parts are
merged, and every line is held against what it must be.
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
from contextlib import suppress
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
from vlmfix.jobs.folder import Questions, job, merge_blocks, pulse, steal, worker
from vlmfix.jobs.folder.merge import merge
from vlmfix.jobs.journal import DIED
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
HANG = 4.0
"""Leases for which a worker hangs: one until it is seen to hang, one until its blocks are another's, and some more."""
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
        hangs: Times that the thread of a worker that answers hangs for longer than its lease.
        full: Times that the disk is full for all.
        poison: Pictures on which the process dies, in turn when it answers them and when it opens them.
        lease: Seconds of a lease, and of a batch that is taken for one that hangs.
        rows: Rows of a batch.
        model: A model to answer in place of the stub; empty for that.
        seed: Seed of all chance.
    """

    pictures: int
    workers: int
    kills: int
    stalls: int = 0
    hangs: int = 0
    full: int = 0
    poison: int = 0
    lease: float = 60.0
    rows: int = 32
    model: str = ""
    seed: int = 0

    @property
    def poisoned(self) -> list[int]:
        """Returns the numbers of the pictures that are poison."""
        places = [(2 * turn + 1) * self.pictures // (2 * self.poison) for turn in range(self.poison)]
        return [number + (number % HOSTILE == WHICH) for number in places]


@dataclass(frozen=True)
class Kept:
    """Says what came of it.

    Attributes:
        answers: Answers in the joined folder.
        failures: Failures in it.
        given_up: Those of them on which processes died.
        lost: Pictures that have neither.
        twice: Lines too many.
        wrong: Lines with the answer of another picture, failures of fine pictures, and answers about what is none.
        asked: Questions that workers put to their answerers altogether.
        kills: Workers that were killed.
        deaths: Workers that died of a picture.
        starts: Workers that were started.
        early: Workers that ended before their time, without having been killed.
        seconds: Time until the last worker had ended.
        merged: Time of the merge.
        peak: Most memory of this process, in bytes: it starts workers and merges.
    """

    answers: int
    failures: int
    given_up: int
    lost: int
    twice: int
    wrong: int
    asked: int
    kills: int
    deaths: int
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


def number_of(picture: Image.Image) -> int:
    """Returns the number of a picture."""
    found = picture.getpixel((0, 0))
    assert isinstance(found, tuple)
    red, green, blue = map(int, found)
    return red | green << 8 | blue << 16


def said(prompt: str, number: int) -> str:
    """Returns what the stub says of a picture of that number."""
    return f"{prompt} {number}"


def die() -> None:
    """Ends the process as a fault in a library does."""
    os.kill(os.getpid(), signal.SIGKILL)


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

    def __init__(self, rows: int, count: Callable[[Sequence[Question]], None]) -> None:
        super().__init__(parse("greedy"), "stub")
        self.rows = self.ahead = rows
        self._count = count

    def outcomes(self, batches: Iterable[Sequence[Asked[Item]]]) -> Generator[tuple[Sequence[Asked[Item]], Outcomes]]:
        """Answers at once."""
        for batch in batches:
            questions = asked(batch)
            self._count(questions)
            yield batch, iter([self.outcome(question) for question in questions])

    def outcome(self, question: Question) -> Answer | Failure:
        """Answers one."""
        assert question.picture is not None
        return Answer(said(question.prompt, number_of(question.picture)), 1, "eos", 0.0, (5,))


def _work(plan: Plan, out: Path, full: Path, counts: Any, hanging: Any, slot: int) -> None:  # noqa: ANN401 (shared arrays)
    """Runs in each worker's process."""
    sys.stderr = open(out.parent / "workers.log", "a", buffering=1)
    blocks.LEASE_SECONDS = pulse.STILL_SECONDS = plan.lease
    opened, answered = set(plan.poisoned[1::2]), set(plan.poisoned[::2])

    def drawn(file: Found) -> Picture:
        if int(file.name[:9]) in opened:
            die()
        return draw(file)

    images.open_found = drawn
    job.__dict__["source_of"] = lambda place, **_: Drawn(place, plan.pictures)
    _fill(out, full)

    def count(questions: Sequence[Question]) -> None:
        counts[slot] += len(questions)
        if hanging[slot]:
            hanging[slot] = 0
            time.sleep(HANG * plan.lease)
        if answered and any(number_of(question.picture) in answered for question in questions if question.picture):
            die()

    if not plan.model:
        worker.__dict__["Answerer"] = lambda *_: Stub(plan.rows, count)
    else:
        part = Answerer.part

        def counted(self: Any, questions: Sequence[Question], *rest: Any) -> Any:  # noqa: ANN401
            count(questions)
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
    counts, hanging = context.RawArray(c_uint64, SLOTS), context.RawArray(c_uint64, SLOTS)
    running: dict[int, Any] = {}
    starts = kills = deaths = early = 0
    stopped: list[tuple[float, int]] = []
    filled, told = 0.0, begun
    faults = sorted(
        (chance.uniform(0.02, 0.98) * plan.pictures, fault)
        for fault, times in (
            ("kill", plan.kills),
            ("stall", plan.stalls),
            ("hang", plan.hangs),
            ("full", plan.full),
        )
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
                deaths += process.exitcode < 0
                if early > (plan.full + 1) * plan.workers + plan.workers:
                    raise DataError(f"workers cannot begin; {out.parent / 'workers.log'} says why", "mend that")
        for until, slot in list(stopped):
            if now > until:
                stopped.remove((until, slot))
                if slot in running:
                    _signal(running[slot], signal.SIGCONT)
        if filled and now > filled:
            filled = 0.0
            full.unlink()
        while not over and not filled and len(running) < plan.workers:
            process = context.Process(target=_work, args=(plan, out, full, counts, hanging, starts), daemon=True)
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
                _signal(running[slot], signal.SIGSTOP)
                stopped.append((now + 1.5 * plan.lease, slot))
            elif fault == "hang":
                begun_to_answer = [one for one in running if counts[one] > 2 * plan.rows]
                hanging[chance.choice(begun_to_answer or list(running))] = 1
            elif fault == "full":
                full.touch()
                filled = now + FULL_SECONDS
        if now - told > 10:
            told = now
            report(
                f"{done:,} of {plan.pictures:,} asked, {kills} killed, {deaths} died of a picture, "
                f"{early} ended early, {now - begun:.0f} s"
            )
    seconds = time.monotonic() - begun
    begun, source_of = time.monotonic(), merge_blocks.__dict__["source_of"]
    merge_blocks.__dict__["source_of"] = lambda place, **_: Drawn(place, plan.pictures)
    try:
        merge(out)
    finally:
        merge_blocks.__dict__["source_of"] = source_of
    merged = time.monotonic() - begun
    answers, failures, given_up, lost, twice, wrong = _checked(plan, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Kept(
        answers,
        failures,
        given_up,
        lost,
        twice,
        wrong,
        sum(counts[:starts]),
        kills,
        deaths,
        starts,
        early,
        seconds,
        merged,
        peak,
    )


def _signal(process: Any, number: int) -> None:  # noqa: ANN401 (of any context)
    with suppress(ProcessLookupError):  # it has died of a picture just now
        os.kill(process.pid, number)


def _checked(plan: Plan, out: Path) -> tuple[int, int, int, int, int, int]:
    """Counts answers, failures, those given up, pictures that have neither, lines too many, and wrong lines."""
    times, poisoned = bytearray(plan.pictures), set(plan.poisoned)
    found, given_up, twice, wrong = {ANSWERS: 0, FAILED: 0}, 0, 0, 0
    for name in found:
        for line in read_lines(out / name):
            number = int(line["image"][:9])
            found[name] += 1
            twice += times[number] > 0
            times[number] = 1
            if number in poisoned:
                given_up += line.get("reason") == DIED
                wrong += line.get("reason") != DIED
                continue
            right = (number % HOSTILE == WHICH) == (name == FAILED) and line.get("reason") != DIED
            if name == ANSWERS and not plan.model:
                right = right and line["answer"] == said(PROMPT, number)
            wrong += not right
    return found[ANSWERS], found[FAILED], given_up, times.count(0), twice, wrong
