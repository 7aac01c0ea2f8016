"""How long work may go on, and processes that share it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch

from vlmfix.errors import VlmfixError


class OutOfTimeError(Exception):
    """The time that was given is over; what is done is on the disk."""


@dataclass(frozen=True)
class Clock:
    """When to stop.

    Attributes:
        end: Seconds since the epoch, so that every process understands it; None for never.
    """

    end: float | None = None

    def check(self) -> None:
        """Goes on or not.

        Raises:
            OutOfTimeError: The end has come.
        """
        if self.end is not None and time.time() > self.end:
            raise OutOfTimeError

    def report(self, done: int, total: int) -> None:
        """Calls ``check`` where a run reports its progress, so that the run stops soon after the end has come.

        Raises:
            OutOfTimeError: The end has come.
        """
        self.check()


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Attributes:
        function: Of a module's top level, so that it can be sent to another process.
        arguments: Its arguments, which can be sent too.
        cost: How long it takes, in any unit; who lists jobs begins with the longest.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cost: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        value: What it returned; None when it did not come to an end.
        problem: Why it failed, in a sentence; empty when it did not.
        seconds: How long it took, or 0 when it was not begun.
        stopped: The time was over.
    """

    value: Any = None
    problem: str = ""
    seconds: float = 0.0
    stopped: bool = False


@contextmanager
def crew(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that take jobs, until the block ends; they end with the one that began them, however it ends.

    On a machine with several GPUs they are shared out evenly, so that each process sees one.

    Args:
        processes: How many; 1 for none, jobs then run where they are asked for.
    """
    if processes == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    threads = max(1, (os.cpu_count() or 1) // processes)
    begin = (threads, gpus(), context.Value("i", 0))
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=begin) as pool:
        yield pool


def perform(jobs: Mapping[str, Job], clock: Clock, pool: ProcessPoolExecutor | None) -> Iterator[tuple[str, Outcome]]:
    """Does jobs and yields each as it ends; one that fails does not keep the others from being done.

    Args:
        jobs: By name; begun in this order.
        clock: When to begin nothing more; a job that looks at it may end early.
        pool: Who does them, see :func:`crew`; None does them here.
    """
    if pool is None:
        for name, job in jobs.items():
            yield name, _outcome(job, clock)
        return
    begun: dict[Future[Outcome], str] = {pool.submit(_outcome, job, clock): name for name, job in jobs.items()}
    for future in as_completed(begun):
        problem = future.exception()  # of the process, as when it was killed; a job's own is in its outcome
        yield begun[future], future.result() if problem is None else Outcome(problem=f"the process died: {problem}")


def _outcome(job: Job, clock: Clock) -> Outcome:
    started = time.perf_counter()
    try:
        clock.check()
        value = job.function(*job.arguments)
    except OutOfTimeError:
        return Outcome(stopped=True)
    except VlmfixError as error:
        return Outcome(problem=str(error), seconds=time.perf_counter() - started)
    except Exception as error:  # one method at fault does not cost the others their figures; it is told and counted
        traceback.print_exc()
        return Outcome(problem=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - started)
    return Outcome(value, seconds=time.perf_counter() - started)


def gpus() -> list[str]:
    """Names the GPUs that there are, as CUDA_VISIBLE_DEVICES calls them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _begin(threads: int, names: Sequence[str], begun: Synchronized[int]) -> None:
    """Prepares a process: its share of the cores, one GPU, and an end when the first one is gone, be it killed."""
    warnings.simplefilter("ignore")
    with begun.get_lock():
        number = begun.value
        begun.value += 1
    if names:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
