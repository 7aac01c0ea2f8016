"""Runs one of several workers that share a run: each leases blocks of it, and writes them into parts of its own.

``jobs/blocks.py`` has the files by which they know of each other, and why nothing is lost or answered twice.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from vlmfix.answering import Answerer, Outcome
from vlmfix.crew import Crew
from vlmfix.errors import DataError, DiedError, PassingError, UsageError
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM, load
from vlmfix.images import Found, read_ahead
from vlmfix.jobs import blocks as shared
from vlmfix.jobs.blocks import BlockFolder, Lease, Taken, Watch
from vlmfix.jobs.folder.batches import Sample, batches
from vlmfix.jobs.folder.job import SPREAD, Named, Progress, known_settings, prepared, record_of
from vlmfix.jobs.folder.part import Part
from vlmfix.jobs.folder.planner import Planner
from vlmfix.jobs.folder.pulse import Worker
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.folder.suspects import prove, stretches
from vlmfix.jobs.journal import DIED
from vlmfix.jobs.ledger import asked_before
from vlmfix.jobs.lines import CARD
from vlmfix.jobs.shards import shards_in
from vlmfix.records import read_json
from vlmfix.settings import Settings
from vlmfix.supply import Question

PAUSE_SECONDS = 5.0
"""Longest time between two looks at what other workers have left."""


@dataclass(frozen=True)
class Shared:
    """Says what a worker has done, and how far the run is that it shares.

    Attributes:
        progress: The worker's own progress: of the questions that it took.
        blocks: Blocks of the run.
        done: Blocks that are done, by whatever worker.
    """

    progress: Progress
    blocks: int
    done: int


def steal(
    pictures: Path,
    out: Path,
    *,
    questions: Questions,
    settings: Settings,
    column: str | None = None,
    batch_size: int | None = None,
    devices: Sequence[str] = (),
    remarks: Callable[[Iterable[Found]], Sequence[str]] = lambda files: (),
    report: Callable[[Progress], None] = lambda progress: None,
    loader: Callable[..., VLM] = load,
    named: Named = lambda text: (),
) -> Shared:
    """Works on a run beside any number of other workers, until nothing of it is left.

    What they write lies below ``out/blocks``, and ``merge`` joins it. The arguments are those of ``run``.

    Returns:
        What this worker has done.

    Raises:
        UsageError: A setting is not allowed or differs from that of another worker, a question names a picture that is
            not there, or ``out`` belongs to another run.
        DataError: The pictures or ``out`` cannot be used.
        UnsupportedModelError: The model cannot be used.
        SystematicError: Every question fails; nothing is noted about the last failures.
        PassingError: Trouble of the machine left questions open, which another worker or the next start asks.
    """
    pictures = Path(os.path.abspath(pictures))  # workers may be started in different folders
    source, decoder = prepared(pictures, out, questions=questions, settings=settings, column=column)
    _refuse_other_runs(out)
    folder = BlockFolder(out)
    folder.make()
    with ExitStack() as opened:
        worker = opened.enter_context(Worker(folder, known_settings(source, questions, settings, decoder, None)))
        planner = opened.enter_context(Planner(folder, worker, source, questions))
        job = opened.enter_context(_Job(folder, worker, planner, questions, tuple(remarks(source)), report, named))
        if job.wait():
            if devices:
                sample = job.typical() if batch_size is None else []
                job.work(opened.enter_context(Crew(devices, settings, batch_size, sample, loader)), settings)
            else:
                vlm = loader(settings.model, **settings.loading())
                rows = fitting_batch(vlm, decoder, settings, job.typical()) if batch_size is None else batch_size
                job.work(Answerer(vlm, decoder, settings, rows), settings)
        return job.end()


def _refuse_other_runs(out: Path) -> None:
    if os.path.exists(out / CARD) and "merged" not in read_json(out / CARD):
        raise UsageError(f"{out} holds answers that a run wrote itself", "choose another --out, or leave --steal out")
    if others := shards_in(out):
        raise UsageError(f"{out} holds the shard {others[0]}", "choose another --out, or go on with --shard")


class _Job:
    """Answers what a worker gets hold of."""

    def __init__(
        self,
        folder: BlockFolder,
        worker: Worker,
        planner: Planner,
        questions: Questions,
        notes: tuple[str, ...],
        report: Callable[[Progress], None],
        named: Named,
    ) -> None:
        self._folder, self._worker, self._planner, self._questions = folder, worker, planner, questions
        self._notes, self._report, self._named = notes, report, named
        self._watch = Watch(folder)
        self._chance = random.Random(worker.name)
        self._blocks: dict[int, Part] = {}
        self._ends: set[int] = set()
        self._mine: set[int] = set()
        """Blocks that are worked on here, or were left with open questions."""
        self._open: deque[Taken] = deque()
        """Pictures of the block that was begun last, with their open questions."""
        self._looked = 0.0
        self._left: list[int] = []
        self._total = self._done = 0
        self._batch_size = 1
        self._last: tuple[Found, str] | None = None
        self.left_open: list[tuple[str, PassingError]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        died = any(isinstance(part, DiedError) for part in error)
        for block in self._blocks.values():
            with suppress(DataError):  # what it lacks is answered again
                block.close(died=died)

    def wait(self) -> bool:
        """Waits for a block that is free; returns False when all are done but those that were left open here."""
        pause = 0.02
        while not self._open:
            self._worker.moved()
            planning = self._planner.check()
            if self._begin_next():
                continue
            if not planning and not self._left:
                return False
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS)
        return True

    def _begin_next(self) -> bool:
        """Takes a block and begins it; returns False when there is none to be had."""
        if (lease := self._take()) is None:
            return False
        self._begin(lease)
        return True

    def _take(self) -> Lease | None:
        """Takes a block that nobody has, or else one whose worker is dead."""
        planned, _ = self._folder.planned()
        attempts = self._folder.attempts()
        finished = self._folder.finished()  # behind the others, which can only lag
        self._left = [n for n in planned if n not in finished and n not in self._mine and n not in self._ends]
        free = [number for number in self._left if number not in attempts]
        while free:
            number = free.pop(self._chance.randrange(min(len(free), shared.CHOICE)))
            if self._folder.is_end(number):
                self._ends.add(number)
                self._left.remove(number)
            elif lease := self._taken(Lease(number, 0)):
                return lease
        if time.monotonic() - self._looked < shared.LEASE_SECONDS / shared.BEATS:
            return None
        self._looked = time.monotonic()
        self._watch.look()
        for number in self._left:
            if number in attempts and self._watch.is_free(str(last := Lease(number, attempts[number]))):
                if lease := self._taken(Lease(number, last.attempt + 1)):
                    return lease
        return None

    def _taken(self, lease: Lease) -> Lease | None:
        if not self._folder.take(str(lease), self._worker.name) or self._folder.is_done(lease.number):
            return None
        self._mine.add(lease.number)
        return lease

    def typical(self) -> list[Question]:
        """Returns questions that represent those to come: some of the first block, none of them about a suspect."""
        found = [file for file in self._open if not file.problem and self._deaths(file) is None]
        sample = found[:: max(1, len(found) // SPREAD)][:SPREAD]
        if sample:
            self._blocks[sample[0].block].begin([file.name for file in sample])
        return typical(sample, [max((prompt for file in self._open for prompt in file.prompts), key=len)])

    def work(self, answerer: Answerer | Crew, settings: Settings) -> None:
        """Answers until nothing is left.

        Raises:
            PassingError: Trouble of the machine has left questions open.
        """
        self._batch_size = answerer.rows
        self._worker.begin(
            answerer.known,
            settings,
            batch_size=answerer.rows,
            prompts_file=self._questions.file_name or None,
            peak=lambda: answerer.peak_memory,
        )
        while self.wait():  # outside, so that nothing waits for an answer while this waits for other workers
            for files in stretches(
                self._chunks(answerer.ahead),
                most=answerer.rows,
                deaths=self._deaths,
                begin=lambda files, apart: self._note(files, apart, answerer),
            ):
                self._answer(files, answerer)
        if self.left_open:
            first, trouble = self.left_open[0]
            raise PassingError(
                f"{len(self.left_open)} questions are left open, the first {first}: {trouble.message}",
                f"the same command asks them again; {trouble.hint}",
            )

    def _answer(self, files: Iterable[Taken], answerer: Answerer | Crew) -> None:
        with (
            closing(read_ahead(files, batch=answerer.ahead)) as pictures,
            closing(answerer(batches(pictures, answerer, self._unopened), self._asked_before)) as answers,
        ):
            for settled in answers:
                for sample, outcome in settled:
                    self._settle(sample, outcome)
                self._worker.moved(batch=True)
                self._batch_size = answerer.rows
                self._report(self.progress())

    def _deaths(self, file: Taken) -> int | None:
        return self._blocks[file.block].journal.deaths(file.name)

    def _note(self, files: Sequence[Taken], apart: bool, answerer: Answerer | Crew) -> None:
        """Notes pictures of one block that are about to be answered."""
        block = self._blocks[files[0].block]
        if not self._worker.totals.answers and any(block.journal.is_doubtful(file.name) for file in files):
            prove(answerer, self._asked_before)
        block.begin([file.name for file in files], apart=apart)

    def _chunks(self, count: int) -> Iterator[list[Taken]]:
        """Yields the pictures of all blocks that can be had at once, at most so many at a time and of one block."""
        while True:
            while self._open:
                yield [self._open.popleft() for _ in range(min(count, len(self._open)))]
            self._planner.check_in_time()
            if not self._begin_next():
                return

    def _begin(self, lease: Lease) -> None:
        """Begins a block with what earlier attempts have of it; open is the rest.

        Pictures on which a worker died alone come last, so that the others are done before another one dies.
        """
        block = Part(self._folder, lease, self._worker.name)
        self._blocks[lease.number] = block
        for line in self._folder.inherited(lease):
            block.write(line)
        still_open = []
        for file in self._folder.pictures(lease.number, self._planner.base):
            asked = () if (file.name,) in block.known else self._questions.of_picture(file)
            prompts = tuple(prompt for prompt in asked if (file.name, prompt) not in block.known)
            self._total += len(prompts)
            if block.journal.is_given_up(file.name):
                for prompt in prompts:
                    self._write(lease.number, {"image": file.name, "reason": DIED, "prompt": prompt})
                self._done += len(prompts)
            elif prompts:
                still_open.append(replace(file, prompts=prompts))
                block.left += len(prompts)
        self._open.extend(sorted(still_open, key=lambda file: block.journal.is_doubtful(file.name)))
        if not still_open:
            self._finish(lease.number)

    def _unopened(self, file: Found, reason: str) -> None:
        number = _block(file)
        self._write(number, {"image": file.name, "reason": reason})
        self._blocks[number].journal.settle(file.name)
        self._step(number, len(file.prompts))
        self._worker.moved()
        self._report(self.progress())

    def _settle(self, sample: Sample, outcome: Outcome) -> None:
        number = _block(sample.file)
        if isinstance(outcome, PassingError):
            self._blocks[number].left_open += 1
            self._blocks[number].journal.leave([sample.image])
            self.left_open.append((f"about {sample.image}", outcome))
        elif isinstance(outcome, str):
            self._write(number, {"image": sample.image, "reason": outcome, "prompt": sample.prompt})
        else:
            self._write(number, record_of(sample, outcome, self._named))
            self._last = sample.file, sample.prompt
        if sample.is_last and not isinstance(outcome, PassingError):
            self._blocks[number].journal.settle(sample.image)
        self._step(number, 1)

    def _write(self, number: int, line: dict[str, Any]) -> None:
        self._blocks[number].write(line)
        if "reason" in line:
            self._worker.totals.failed += 1
        else:
            self._worker.totals.count(line)

    def _step(self, number: int, count: int) -> None:
        block = self._blocks[number]
        block.left -= count
        self._done += count
        if block.left == 0:
            self._finish(number)

    def _finish(self, number: int) -> None:
        block = self._blocks.pop(number)
        if block.left_open:
            block.close()  # it stays this worker's until that ends
        else:
            block.finish()
            self._mine.discard(number)

    def _asked_before(self) -> Question | None:
        """Returns a question that has been answered here, or else in a block that is done or was taken over."""
        if self._last is not None and (found := asked_before([self._last])) is not None:
            return found
        return asked_before(self._answered())

    def _answered(self) -> Iterator[tuple[Found, str]]:
        for number, block in self._blocks.items():
            yield from self._with_files(number, block.answered)
        for number in sorted(self._folder.finished()):
            lines = itertools.islice(self._folder.lines(number), SPREAD)
            yield from self._with_files(number, {line["image"]: line["prompt"] for line in lines if "answer" in line})

    def _with_files(self, number: int, answered: dict[str, str]) -> Iterator[tuple[Found, str]]:
        for file in self._folder.pictures(number, self._planner.base) if answered else ():
            if file.name in answered:
                yield file, answered[file.name]

    def progress(self) -> Progress:
        """Returns the worker's own progress."""
        return Progress(
            self._total,
            0,
            self._done,
            self._worker.totals.answers,
            self._worker.totals,
            self._batch_size,
            0,
            self._notes,
        )

    def end(self) -> Shared:
        """Returns what was done, and how far the run is."""
        planned, _ = self._folder.planned()
        numbers = [number for number in planned if not self._folder.is_end(number)]
        return Shared(self.progress(), len(numbers), len(self._folder.finished()))


def _block(file: Found) -> int:
    """Returns the number of the block that a picture belongs to."""
    assert isinstance(file, Taken)
    return file.block
