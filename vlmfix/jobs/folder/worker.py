"""Runs one of several workers that share a run: each leases blocks of it, and writes them into parts of its own.

``jobs/blocks.py`` has the files by which they know of each other, and why nothing is lost or answered twice.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from PIL import Image

from vlmfix.answering import Answerer, Outcome
from vlmfix.card import Known, versions
from vlmfix.crew import Crew
from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.files import make_folder
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM, load
from vlmfix.images import Found, Picture, read_ahead
from vlmfix.jobs import blocks as shared
from vlmfix.jobs.blocks import LINE, LINES, BlockFolder, Lease, Taken, Watch, named_worker, noted, size_of
from vlmfix.jobs.folder.job import SPREAD, Named, Progress, Sample, known_settings, prepared, record_of
from vlmfix.jobs.folder.output import Totals, measured
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.ledger import CARD_SECONDS, asked_before, facts_of, now
from vlmfix.jobs.lines import CARD, MARKS
from vlmfix.jobs.shards import shards_in
from vlmfix.records import JsonLines, read_json, refuse_other
from vlmfix.seen import Seen
from vlmfix.settings import Settings
from vlmfix.sources import Source
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
        worker = opened.enter_context(_Worker(folder, known_settings(source, questions, settings, decoder, None)))
        planner = opened.enter_context(_Planner(folder, worker, source, questions))
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


class _Worker:
    """Keeps the file of a worker, which says what it answers with, how far it is, and again and again that it lives."""

    def __init__(self, folder: BlockFolder, settings: dict[str, Any]) -> None:
        self.name = named_worker()
        self._folder = folder
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._marked = 0.0
        self._asked = settings
        self.totals = Totals()
        self._peak_memory: Callable[[], int] = lambda: 0
        self.card: dict[str, Any] = {
            "worker": self.name,
            "beat": 0,
            "ended": False,
            "planning": False,
            "settings": settings,
            "started": now(),
            "updated": now(),
            "sessions": [],
            "totals": self.totals.noted(),
            "recent": [],
        }

    def __enter__(self) -> Self:
        self._save_alike()
        self._thread = threading.Thread(target=self._beat, name="vlmfix-beat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self.card["ended"] = True
        with suppress(DataError):  # then its lease runs out
            self.save()

    def _beat(self) -> None:
        while not self._ending.wait(shared.LEASE_SECONDS / shared.BEATS):
            with suppress(DataError):  # the disk may be full, and the next one may be written
                self.save()

    def save(self) -> None:
        """Writes the file, with another sign of life."""
        with self._lock:
            self.card["beat"] += 1
            self.card["updated"] = now()
            self.card["totals"] = self.totals.noted()
            if self.card["sessions"]:
                self.card["sessions"][-1]["peak_memory"] = self._peak_memory()
                if time.monotonic() - self._marked > CARD_SECONDS or self.card["ended"]:
                    done = self.totals.answers + self.totals.failed
                    self.card["recent"] = [*self.card["recent"], {"time": now(), "done": done}][-MARKS:]
                    self._marked = time.monotonic()
            self._folder.write_card(self.name, self.card)

    def _save_alike(self) -> None:
        """Writes the file, and then compares it with those of others, so that of two at least one sees the other.

        Raises:
            UsageError: Another worker answers with other settings.
        """
        self.save()
        mine = self.card["settings"]
        try:
            for name, card in self._folder.cards().items():
                before = card["settings"]
                both_begun = card["sessions"] and self.card["sessions"]
                names = mine if both_begun else [known for known in mine if known in before]
                path = self._folder.workers / f"{name}.json"
                refuse_other(self._folder.out, path, before, {known: mine[known] for known in names})
        except UsageError:
            self.card |= {"sessions": [], "settings": self._asked}  # it has answered nothing
            (self._folder.workers / f"{self.name}.json").unlink(missing_ok=True)
            raise

    def begin(
        self, model: Known, settings: Settings, *, batch_size: int, prompts_file: str | None, peak: Callable[[], int]
    ) -> None:
        """Notes that a model starts to work; see ``Ledger.start_session``.

        Raises:
            UsageError: Another worker answers with other weights, files or facts.
        """
        with self._lock:
            self._peak_memory = peak
            self.card["settings"] = {
                **self.card["settings"],
                **facts_of(model, settings),
                "decoder_facts": dict(model.facts),
            }
            session = {"started": now(), "device": model.device, "batch_size": batch_size, "peak_memory": 0}
            self.card["sessions"] = [
                {**session, "prompts_file": prompts_file, "versions": versions(), **measured(settings)}
            ]
        self._save_alike()

    def plans(self, planning: bool) -> None:
        """Notes whether it plans."""
        with self._lock:
            self.card["planning"] = planning
        self.save()


class _Planner:
    """Plans the run in a thread of its own when it has to be and no other worker does."""

    def __init__(self, folder: BlockFolder, worker: _Worker, source: Source, questions: Questions) -> None:
        self._folder, self._worker, self._source, self._questions = folder, worker, source, questions
        self.base = source.place if os.path.isdir(source.place) else source.place.parent
        self._watch = Watch(folder)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._ending = threading.Event()
        self._checked = 0.0
        self._again = self._is_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _is_over(self) -> bool:
        """Says whether all that was planned is done, so that only pictures that were added are left."""
        numbers, end = self._folder.planned()
        done = self._folder.finished()
        return end is not None and all(number in done or self._folder.is_end(number) for number in numbers)

    def check(self) -> bool:
        """Begins to plan if that is needed, and says whether this worker or another one plans.

        Raises:
            VlmfixError: Planning failed here.
        """
        self._checked = time.monotonic()
        if self._error is not None:
            raise self._error
        if self._thread is not None and self._thread.is_alive():
            return True
        if self._folder.planned()[1] is not None and not self._again:
            return False
        last = self._folder.planning()
        self._watch.look()
        if last is not None and not self._is_free(_plan(last)):
            self._again = False  # the other one plans for all
            return True
        self._again = False
        if self._worker.card["planning"]:  # it has come to its end since
            self._worker.plans(False)
        self._worker.plans(True)
        if self._folder.take(_plan(0 if last is None else last + 1), self._worker.name):
            self._thread = threading.Thread(target=self._plan, name="vlmfix-plan", daemon=True)
            self._thread.start()
        else:
            self._worker.plans(False)
        return True

    def check_in_time(self) -> None:
        """Does the same from time to time, and raises what has failed here at once."""
        if self._error is not None:
            raise self._error
        if time.monotonic() - self._checked > shared.LEASE_SECONDS / shared.BEATS:
            self.check()

    def _is_free(self, lease: str) -> bool:
        card = self._folder.card(self._folder.owner(lease))
        return (card is not None and not card["planning"]) or self._watch.is_free(lease)

    def _plan(self) -> None:
        try:
            self._write()
        except Exception as error:  # raised again where the worker looks for it
            self._error = error
        with suppress(DataError):
            self._worker.plans(False)

    def _write(self) -> None:
        """Adds to the plan what it lacks of the source, and an end."""
        if self._questions.named:
            self._questions.check(self._source)
        self._known, self._number, self._before = Seen(), 0, 0
        while self._read():
            pass
        pending: list[tuple[Found, tuple[str, ...]]] = []
        count = 0
        for file in self._source:
            if self._ending.is_set():
                return
            asked = self._questions.of_picture(file)
            prompts = tuple(prompt for prompt in asked if self._known.add((file.name, prompt)))
            if prompts:
                pending.append((file, prompts))
                count += len(prompts)
            if count >= size_of(self._number):
                self._publish(pending)
                pending, count = [], 0
        self._publish(pending)
        if self._before == 0:
            raise DataError(f"no file in {self._source.place}", "give a picture, or a folder with pictures")
        while self._number == 0 or not self._folder.is_end(self._number - 1):
            self._folder.publish(self._number, [], self._before, 0)
            self._read()

    def _publish(self, pending: list[tuple[Found, tuple[str, ...]]]) -> None:
        while pending:
            count = sum(len(prompts) for _, prompts in pending)
            lines = [noted(file, prompts if self._questions.tabled else (), self.base) for file, prompts in pending]
            if self._folder.publish(self._number, lines, self._before, count):
                self._number, self._before = self._number + 1, self._before + count
                return
            theirs = self._read()  # another one planned while this one was thought to be dead, or the other way round
            left = (
                (file, tuple(prompt for prompt in prompts if (file.name, prompt) not in theirs))
                for file, prompts in pending
            )
            pending = [(file, prompts) for file, prompts in left if prompts]

    def _read(self) -> set[tuple[str, str]]:
        """Reads the next block of the plan, and returns its questions and one more; nothing where there is none."""
        if not os.path.exists(self._folder.plan / f"{self._number:08d}"):
            return set()
        theirs = {("", "")}
        for file in self._folder.pictures(self._number, self.base):
            for prompt in self._questions.of_picture(file):
                theirs.add((file.name, prompt))
                self._known.add((file.name, prompt))
        self._before += self._folder.head(self._number)[1]
        self._number += 1
        return theirs


def _plan(attempt: int) -> str:
    return f"plan-{attempt:04d}"


class _Block:
    """Writes one attempt at a block."""

    def __init__(self, folder: BlockFolder, lease: Lease, worker: str) -> None:
        self._folder, self._lease, self._worker = folder, lease, worker
        make_folder(folder.part(lease))
        self._lines = JsonLines(folder.part(lease) / LINES, LINE)
        self._open = True
        self.left = self.left_open = 0
        self.answers = 0
        self.answered: dict[str, str] = {}
        """The first pictures that were answered, each with a prompt."""
        self.reasons: Counter[str] = Counter()
        self.known: set[tuple[str, ...]] = set()
        """(image, prompt) of answers and failures, and (image,) of pictures that cannot be opened."""

    def write(self, line: dict[str, Any]) -> None:
        """Writes an answer or a failure, unless it stands there; what belongs to a block that is done is let go.

        Raises:
            DataError: It cannot be written.
        """
        key = (line["image"], line["prompt"]) if "prompt" in line else (line["image"],)
        if key in self.known:
            return
        try:
            self._lines.append(line)
        except DataError:
            if not self._folder.is_done(self._lease.number):  # else another attempt was first, and has removed this one
                raise
        self.known.add(key)
        if "reason" in line:
            self.reasons[line["reason"]] += 1
        else:
            self.answers += 1
            if len(self.answered) < SPREAD:
                self.answered[line["image"]] = line["prompt"]

    def finish(self) -> bool:
        """Makes the part that of its block; returns False where another attempt was first."""
        self.close()
        counts = {"answers": self.answers, "failed": self.reasons.total(), "reasons": dict(self.reasons)}
        return self._folder.finish(self._lease, {**counts, "worker": self._worker})

    def close(self) -> None:
        """Closes the file; a start that takes the block over goes on with what is there."""
        if self._open:
            self._open = False
            self._lines.close()


class _Job:
    """Answers what a worker gets hold of."""

    def __init__(
        self,
        folder: BlockFolder,
        worker: _Worker,
        planner: _Planner,
        questions: Questions,
        notes: tuple[str, ...],
        report: Callable[[Progress], None],
        named: Named,
    ) -> None:
        self._folder, self._worker, self._planner, self._questions = folder, worker, planner, questions
        self._notes, self._report, self._named = notes, report, named
        self._watch = Watch(folder)
        self._chance = random.Random(worker.name)
        self._blocks: dict[int, _Block] = {}
        self._ends: set[int] = set()
        self._mine: set[int] = set()
        """Blocks that are worked on here, or were left with open questions."""
        self._lease: Lease | None = None
        self._looked = 0.0
        self._left: list[int] = []
        self._total = self._done = 0
        self._batch_size = 1
        self._last: tuple[Found, str] | None = None
        self._opened: dict[str, Found] = {}
        self.left_open: list[tuple[str, PassingError]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks.values():
            with suppress(DataError):  # what it lacks is answered again
                block.close()

    def wait(self) -> bool:
        """Waits for a block that is free; returns False when all are done but those that were left open here."""
        pause = 0.02
        while True:
            planning = self._planner.check()
            self._lease = self._lease or self._take()
            if self._lease is not None:
                return True
            if not planning and not self._left:
                return False
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS)

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
        """Returns questions that represent those to come: some of the first block."""
        assert self._lease is not None
        found = [file for file in self._folder.pictures(self._lease.number, self._planner.base) if not file.problem]
        longest = max((prompt for file in found for prompt in self._questions.of_picture(file)), key=len, default="")
        return typical(found[:: max(1, len(found) // SPREAD)][:SPREAD], [longest])

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
            with (
                closing(read_ahead(self._files(), batch=answerer.ahead)) as pictures,
                closing(answerer(self._batches(pictures, answerer), self._asked_before)) as answers,
            ):
                for settled in answers:
                    for sample, outcome in settled:
                        self._settle(sample, outcome)
                    self._batch_size = answerer.rows
                    self._report(self.progress())
        if self.left_open:
            first, trouble = self.left_open[0]
            raise PassingError(
                f"{len(self.left_open)} questions are left open, the first {first}: {trouble.message}",
                f"the same command asks them again; {trouble.hint}",
            )

    def _files(self) -> Iterator[Taken]:
        """Yields the pictures of all blocks that can be had at once, with their open questions."""
        while True:
            self._planner.check_in_time()
            lease, self._lease = self._lease or self._take(), None
            if lease is None:
                return
            yield from self._begun(lease)

    def _begun(self, lease: Lease) -> Iterator[Taken]:
        """Begins a block with what earlier attempts have of it, and yields the rest."""
        block = _Block(self._folder, lease, self._worker.name)
        self._blocks[lease.number] = block
        for line in self._folder.inherited(lease):
            block.write(line)
        still_open = []
        for file in self._folder.pictures(lease.number, self._planner.base):
            asked = () if (file.name,) in block.known else self._questions.of_picture(file)
            prompts = tuple(prompt for prompt in asked if (file.name, prompt) not in block.known)
            if prompts:
                still_open.append(replace(file, prompts=prompts))
                block.left += len(prompts)
        self._total += block.left
        if not still_open:
            self._finish(lease.number)
        yield from still_open

    def _batches(
        self, pictures: Iterable[tuple[Found, Picture | DataError | PassingError]], answerer: Answerer | Crew
    ) -> Iterator[list[tuple[Sample, Question | PassingError]]]:
        samples = self._samples(pictures)
        while batch := list(itertools.islice(samples, answerer.rows)):
            yield [
                (sample, shown if isinstance(shown, PassingError) else Question(shown, sample.prompt))
                for sample, shown in batch
            ]

    def _samples(
        self, pictures: Iterable[tuple[Found, Picture | DataError | PassingError]]
    ) -> Generator[tuple[Sample, Image.Image | PassingError]]:
        for file, picture in pictures:
            assert isinstance(file, Taken)
            if isinstance(picture, DataError):
                self._write(file.block, {"image": file.name, "reason": str(picture)})
                self._step(file.block, len(file.prompts))
                self._report(self.progress())
                continue
            digest = "" if isinstance(picture, PassingError) else picture.sha256
            shown = picture if isinstance(picture, PassingError) else picture.image
            for prompt in file.prompts:
                self._opened[file.name] = file
                yield Sample(file.name, digest, prompt, file.block), shown

    def _settle(self, sample: Sample, outcome: Outcome) -> None:
        file = self._opened.pop(sample.image, None)
        if isinstance(outcome, PassingError):
            self._blocks[sample.block].left_open += 1
            self.left_open.append((f"about {sample.image}", outcome))
        elif isinstance(outcome, str):
            self._write(sample.block, {"image": sample.image, "reason": outcome, "prompt": sample.prompt})
        else:
            self._write(sample.block, record_of(sample, outcome, self._named))
            if file is not None:
                self._last = file, sample.prompt
        self._step(sample.block, 1)

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
