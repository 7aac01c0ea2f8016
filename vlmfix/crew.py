"""Answers the questions of one job in several processes, each with the model on a device of its own.

The process that starts the others keeps the job: it opens pictures, sends batches out and settles the results in the
order of the questions, so that files are written as by one process. The others know nothing of the job's folder; they
end at once when the job ends, and when one of them ends early, the job ends.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Self, TypeVar

import torch

from vlmfix.answering import Answerer, Asked, Failure, Outcomes, Settling, asked
from vlmfix.card import Known
from vlmfix.decoders import parse
from vlmfix.errors import DiedError, SystematicError, UsageError, VlmfixError
from vlmfix.fitting import fitting_batch
from vlmfix.generation import VLM, Answer
from vlmfix.settings import Settings
from vlmfix.supply import THREADS, Question

Item = TypeVar("Item")

IN_FLIGHT = 3
"""Batches that a process has: one that it answers, one that it prepares, and one on the way."""
PRELOADED = ["vlmfix.crew"]
"""Modules that are imported once and shared by the processes."""


@dataclass(frozen=True)
class _Ready:
    """Reports that a process has loaded its model.

    Attributes:
        known: Identity of the model.
        rows: Rows of its batches.
    """

    known: Known
    rows: int


@dataclass(frozen=True)
class _Done:
    """Reports that a process has finished a batch.

    Attributes:
        outcomes: Results of the batch's questions.
        rows: Rows of its batches from now on.
        peak: Most bytes that the process has held.
    """

    outcomes: list[Answer | Failure]
    rows: int
    peak: int


@dataclass(frozen=True)
class _Fell:
    """Reports that a process cannot go on.

    Attributes:
        error: The reason.
        trace: The traceback.
    """

    error: VlmfixError
    trace: str


class _Hand:
    """Stands for one process in the job's process."""

    def __init__(self, device: str, process: Any, line: Connection) -> None:  # noqa: ANN401 (one of each context)
        self.device, self.process, self.line = device, process, line
        self.given = 0
        """Batches that were sent and have not come back."""
        self.back: deque[_Done] = deque()
        """Finished batches that nobody has taken yet, oldest first."""
        self.ready: _Ready | None = None
        self.rows, self.peak = 1, 0

    def send(self, questions: Sequence[Question]) -> None:
        try:
            self.line.send(questions)
        except OSError:  # the process may have sent its error
            while True:
                self.receive()
        self.given += 1

    def receive(self) -> None:
        """Takes the next message, or raises the error that ended the process."""
        try:
            message = self.line.recv()
        except (EOFError, OSError):
            raise self.ended() from None
        if isinstance(message, _Fell):
            message.error.add_note(message.trace)
            raise message.error
        if isinstance(message, _Ready):
            self.ready, self.rows = message, message.rows
            return
        self.given -= 1
        self.rows, self.peak = message.rows, message.peak
        self.back.append(message)

    def ended(self) -> DiedError:
        self.process.join(1)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return DiedError(
            f"the process that answered on {self.device} {how}",
            "see what the system's log says; the same command goes on from what is done",
        )


class Crew(Settling):
    """Answers batches in several processes, one for each device; leaving the block ends them at once.

    Args:
        devices: A torch device for each process.
        settings: Model, decoder and generation settings; its ``device`` is not read.
        batch_size: Rows at a time; None takes as many as the free memory of the fullest device allows.
        typical: Questions that represent those to come; see ``fitting.typical``.
        loader: Loads the model; it is called in every process, which must be able to import it.

    Raises:
        VlmfixError: The model cannot be loaded.
        DiedError: A process ended early.
    """

    def __init__(
        self,
        devices: Sequence[str],
        settings: Settings,
        batch_size: int | None,
        typical: Sequence[Question],
        loader: Callable[..., VLM],
    ) -> None:
        super().__init__(parse(settings.decoder), settings.model)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._hands: list[_Hand] = []
        try:
            for number, device in enumerate(devices):
                ours, theirs = context.Pipe()
                task = _Task(replace(settings, device=device), batch_size, typical, loader, len(devices))
                process = context.Process(target=_answer, args=(theirs, task), name=f"vlmfix-{number}", daemon=True)
                process.start()
                theirs.close()
                self._hands.append(_Hand(device, process, ours))
            while not all(hand.ready for hand in self._hands):
                self._receive()
        except BaseException:
            self._end()
            raise

    @property
    def rows(self) -> int:
        """Returns the rows of a batch, on the device that takes the fewest."""
        return min(hand.rows for hand in self._hands)

    @property
    def ahead(self) -> int:
        """Returns the rows of a batch for every process, together."""
        return self.rows * len(self._hands)

    @property
    def known(self) -> Known:
        """Returns the identity of the model, with all devices."""
        ready = [hand.ready.known for hand in self._hands if hand.ready]
        return replace(ready[0], device=", ".join(one.device for one in ready))

    @property
    def peak_memory(self) -> int:
        """Returns the most bytes that any process has held."""
        return max(hand.peak for hand in self._hands)

    def outcomes(self, batches: Iterable[Sequence[Asked[Item]]]) -> Generator[tuple[Sequence[Asked[Item]], Outcomes]]:
        """Sends batches to all processes at once, and yields them in order; see ``Settling.outcomes``."""
        coming = iter(batches)
        waiting: deque[tuple[Sequence[Asked[Item]], _Hand]] = deque()
        exhausted = False
        while True:
            while not exhausted and (hand := self._free(len(waiting))) is not None:
                batch = next(coming, None)
                if batch is None:
                    exhausted = True
                    break
                hand.send(asked(batch))
                waiting.append((batch, hand))
            if not waiting:
                return
            if waiting[0][1].back:
                batch, hand = waiting.popleft()
                yield batch, iter(hand.back.popleft().outcomes)
            else:
                self._receive()

    def outcome(self, question: Question) -> Answer | Failure:
        """Asks the least busy process one more question, after its batches; see ``Settling.outcome``."""
        hand = min(self._hands, key=lambda hand: hand.given)
        before = len(hand.back) + hand.given
        hand.send([question])
        while len(hand.back) <= before:
            self._receive()
        return hand.back.pop().outcomes[0]

    def _free(self, waiting: int) -> _Hand | None:
        """Chooses the process for a further batch; None when all have enough, or too many batches wait for one."""
        hand = min(self._hands, key=lambda hand: hand.given)
        return hand if hand.given < IN_FLIGHT and waiting < 2 * IN_FLIGHT * len(self._hands) else None

    def _receive(self) -> None:
        """Waits until some process sends a message, and takes it."""
        ready = wait([hand.line for hand in self._hands])
        for hand in self._hands:
            if hand.line in ready:
                hand.receive()

    def _end(self) -> None:
        """Kills the processes, which hold nothing that could be lost."""
        for hand in self._hands:
            hand.process.kill()
        for hand in self._hands:
            hand.process.join()
            hand.line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


def devices_of(names: str) -> list[str]:
    """Reads the devices that ``--devices`` names: ``all`` GPUs, their numbers, or torch devices, with commas.

    Raises:
        UsageError: There is no such device.
    """
    count = torch.cuda.device_count()
    if names == "all":
        if not count:
            raise UsageError("--devices all: torch sees no GPU", "leave it out, or use --device cpu")
        return [f"cuda:{number}" for number in range(count)]
    found = []
    for name in names.split(","):
        device = f"cuda:{name}" if name.isascii() and name.isdigit() else name
        kind, _, number = device.partition(":")
        known = kind == "cuda" and number.isdigit() and int(number) < count
        if device != "cpu" and not known:
            raise UsageError(
                f"--devices {names}: there is no device {name!r}; torch sees {count} GPUs",
                "give all, or numbers such as 0,1",
            )
        found.append(device)
    if twice := sorted({device for device in found if device != "cpu" and found.count(device) > 1}):
        raise UsageError(f"--devices {names}: {twice[0]} is named twice", "name each GPU once")
    return found


# -- in the processes


@dataclass(frozen=True)
class _Task:
    settings: Settings
    batch_size: int | None
    typical: Sequence[Question]
    loader: Callable[..., VLM]
    crew: int


def _answer(line: Connection, task: _Task) -> None:
    """Runs in each process: answers batches, and reports its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the job's process, which ends this one
    coming: queue.SimpleQueue[Sequence[Question]] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(line, coming), daemon=True).start()
    try:
        _work(line, task, coming)
    except BaseException as error:  # the job's process reports it
        trace = "".join(traceback.format_exception(error))
        line.send(_Fell(error if isinstance(error, VlmfixError) else _foreign(error, task.settings.device), trace))


def _foreign(error: BaseException, device: str) -> SystematicError:
    first = (str(error).strip().splitlines() or [""])[0]
    return SystematicError(
        f"the process on {device} cannot go on: {type(error).__name__}: {first}", "use --debug for the traceback"
    )


def _take_in(line: Connection, coming: queue.SimpleQueue[Sequence[Question]]) -> None:
    """Receives batches while others are answered; ends the process when the job's process is gone."""
    try:
        while True:
            coming.put(line.recv())
    except (EOFError, OSError):
        os._exit(1)


def _work(line: Connection, task: _Task, coming: queue.SimpleQueue[Sequence[Question]]) -> None:
    settings, cores = task.settings, os.cpu_count() or 1
    if settings.device == "cpu":
        torch.set_num_threads(max(1, cores // task.crew))
    else:
        torch.cuda.set_device(settings.device)  # streams and recorded steps belong to the current device
    vlm, decoder = task.loader(settings.model, **settings.loading()), parse(settings.decoder)
    rows = task.batch_size or fitting_batch(vlm, decoder, settings, task.typical)
    answerer = Answerer(vlm, decoder, settings, rows, threads=max(1, THREADS // task.crew))
    line.send(_Ready(answerer.known, answerer.rows))
    with answerer.supply() as supply:
        questions = coming.get()
        while True:
            following = None if coming.empty() else coming.get()
            outcomes = list(answerer.part(questions, supply, following or ()))
            line.send(_Done(outcomes, answerer.rows, answerer.peak_memory))
            questions = coming.get() if following is None else following
