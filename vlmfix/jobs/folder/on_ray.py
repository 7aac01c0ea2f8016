"""Runs a folder's job on a Ray cluster: Ray Data hands out the questions, and actors with a model each answer them.

The questions are planned into Parquet files, and Ray Data writes the answers into Parquet files. What it has written it
checkpoints by each question's id, so a start that follows a killed one asks the rest. In the end the answers are joined
into the folder as of any run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, PassingError, SystematicError, UsageError, VlmfixError
from vlmfix.extras import need
from vlmfix.files import resolved
from vlmfix.generation import VLM, load
from vlmfix.images import Found
from vlmfix.jobs.blocks import BlockFolder
from vlmfix.jobs.folder.actor import Actor, Task
from vlmfix.jobs.folder.job import Named, Progress, known_settings, prepared
from vlmfix.jobs.folder.joined import MergedFolder
from vlmfix.jobs.folder.output import Totals
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.folder.ray_folder import BLOCK, RayFolder
from vlmfix.jobs.lines import RAY
from vlmfix.jobs.shards import shards_in
from vlmfix.settings import Settings

LIGHT = 0.25
"""Share of a core that Ray is told of for each actor and task, so that on two cores all that a run needs has its place:
Ray's filter of what is checkpointed takes a whole one."""
LOOK_SECONDS = 10.0
"""Time between two looks at how much is written."""


def run_on_ray(
    pictures: Path,
    out: Path,
    *,
    address: str,
    questions: Questions,
    settings: Settings,
    column: str | None = None,
    batch_size: int | None = None,
    remarks: Callable[[Iterable[Found]], Sequence[str]] = lambda files: (),
    report: Callable[[Progress], None] = lambda progress: None,
    loader: Callable[..., VLM] = load,
    named: Named = lambda text: (),
) -> Progress:
    """Asks a model about every picture of a source, on a Ray cluster; see ``run`` for the other arguments.

    Args:
        pictures: The pictures, in a place that all nodes have.
        out: The folder to write, in a place that all nodes have.
        address: ``ray`` for the cluster that Ray finds, or one on this machine; ``ray://HOST:PORT`` for another.
        questions: The prompts.
        settings: Model, decoder and generation settings.
        column: Column of the paths in a table.
        batch_size: Rows per batch; None takes as many as the free memory allows.
        remarks: Called with the files before anything is asked.
        report: Called every ten seconds, and at the end.
        loader: Loads the model in every actor, which must be able to import it.
        named: Finds the object words of a text, where they are asked for; likewise.

    Returns:
        The final state.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: A setting is not allowed, or ``out`` belongs to another run.
        DataError: The pictures or ``out`` cannot be used.
        SystematicError: Actors cannot answer.
        PassingError: Trouble of a machine left questions open, which the next start asks.
    """
    need("ray")
    need("parquet")
    pictures = Path(os.path.abspath(pictures))  # nodes know no folder that the command was given in
    source, decoder = prepared(pictures, out, questions=questions, settings=settings, column=column)
    if BlockFolder(out).is_there or shards_in(out):
        raise UsageError(f"{out} holds a run that is divided in another way", "choose another --out")
    questions.check(source)
    known = known_settings(source, questions, settings, decoder, None)
    with MergedFolder(out, known) as joined:
        folder = RayFolder(out)
        folder.claim(known)
        notes = tuple(remarks(source))
        prompts_file = questions.file_name or None
        task = Task(known, prompts_file, settings, batch_size, folder.base(source), resolved(out), loader, named)
        sample, total = folder.plan(source, questions)
        if not total:
            raise DataError(f"no file in {pictures}", "give a picture, or a folder with pictures")
        before = folder.written()
        if before < total:
            with _watched(folder, total, before, notes, report), _cluster(address) as actors:
                by_gpu = actors > 0 and settings.device != "cpu"
                drive = _work if address == RAY else _driven
                drive(folder, replace(task, sample=sample), abs(actors), by_gpu)
        progress = folder.join(joined, total, before, notes)
    report(progress)
    if progress.done < total:
        raise PassingError(
            f"{total - progress.done} questions are left open",
            "the same command asks them again; see what the logs of Ray's actors say",
        )
    return progress


@contextmanager
def _cluster(address: str) -> Iterator[int]:
    """Connects to Ray, and yields how many actors there is room for: positive by GPUs, negative by cores."""
    import ray

    begun = not ray.is_initialized()
    if begun:
        where = {"address": address} if address != RAY else {}
        try:
            ray.init(**where, log_to_driver=False, logging_level="ERROR", namespace="vlmfix")
        except Exception as error:  # of several kinds
            first = (str(error).strip().splitlines() or [""])[0]
            raise UsageError(f"cannot reach Ray at {address}: {first}", "start a cluster, or take --on ray") from error
    try:
        room = ray.cluster_resources()
        gpus = int(room.get("GPU", 0))
        yield gpus or -max(1, int(room.get("CPU", 1)) // 2)
    finally:
        if begun:
            ray.shutdown()


def _driven(folder: RayFolder, task: Task, actors: int, by_gpu: bool) -> None:
    """Lets a task in the cluster drive the work, for Ray Data cannot be driven by a client."""
    import ray

    try:
        ray.get(ray.remote(num_cpus=LIGHT)(_work).remote(folder, task, actors, by_gpu))
    except Exception as error:  # Ray's, which hold those of the task
        raise _told(error) from error


def _work(folder: RayFolder, task: Task, actors: int, by_gpu: bool) -> None:
    """Lets Ray Data answer what is not checkpointed.

    Raises:
        VlmfixError: An actor raised it.
        SystematicError: Ray ended the work for another reason.
    """
    import logging

    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    logging.getLogger("ray").setLevel(logging.ERROR)
    context = DataContext.get_current()
    before = context.checkpoint_config, context.enable_progress_bars
    context.checkpoint_config = CheckpointConfig(
        "id", resolved(folder.checkpoint).as_uri(), delete_checkpoint_on_success=False
    )
    context.enable_progress_bars = False
    try:
        files = sorted(folder.questions.glob("*.parquet"))
        questions = ray.data.read_datasource(planned(files), ray_remote_args={"num_cpus": LIGHT})
        answers = questions.map_batches(
            Actor,
            fn_constructor_args=(task,),
            batch_format="pyarrow",
            batch_size=None,
            compute=ActorPoolStrategy(min_size=1, max_size=actors, max_tasks_in_flight_per_actor=2),
            num_gpus=1 if by_gpu else 0,
            num_cpus=0 if by_gpu else LIGHT,
        )
        answers.write_parquet(str(resolved(folder.answers)), ray_remote_args={"num_cpus": LIGHT})
    except Exception as error:  # Ray's, which hold those of actors
        raise _told(error) from error
    finally:
        context.checkpoint_config, context.enable_progress_bars = before


def _told(error: BaseException) -> VlmfixError:
    """Finds what an actor raised in what Ray made of it."""
    inner: BaseException | None = error
    while inner is not None:
        for found in (inner, getattr(inner, "cause", None)):
            if isinstance(found, VlmfixError):
                return type(found)(found.message, found.hint) if type(found) in VlmfixError.__subclasses__() else found
        inner = inner.__cause__ or getattr(inner, "cause", None)
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return SystematicError(
        f"the work on Ray ended: {lines[-1]}", "the same command goes on; use --debug for the traceback"
    )


def planned(files: Sequence[Path]) -> Any:  # noqa: ANN401 (a class of Ray's, which is an extra)
    """Returns a source of Ray Data with a block for each file of questions."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    paths = [str(resolved(path)) for path in files]

    class _Planned(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int:
            return len(paths) * BLOCK * 200

        def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[Any]:
            about = BlockMetadata(num_rows=None, size_bytes=BLOCK * 200, input_files=None, exec_stats=None)
            return [ReadTask(_Read(path), about) for path in paths]

    return _Planned()


class _Read:
    """Reads one block of questions."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self) -> list[Any]:
        import pyarrow.parquet as parquet

        return [parquet.read_table(self._path)]


@contextmanager
def _watched(
    folder: RayFolder,
    total: int,
    before: int,
    notes: tuple[str, ...],
    report: Callable[[Progress], None],
) -> Iterator[None]:
    """Reports how much is written, again and again inside the block."""
    ending = threading.Event()

    def watch() -> None:
        while not ending.wait(LOOK_SECONDS):
            done = folder.written()
            report(Progress(total, before, done, done - before, Totals(answers=done), BLOCK, notes=notes))

    thread = threading.Thread(target=watch, name="vlmfix-ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
