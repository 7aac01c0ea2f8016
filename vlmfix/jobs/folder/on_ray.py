"""Runs a folder's job on a Ray cluster: Ray Data hands out the questions, and actors with a model each answer them.

The questions are planned into Parquet files, and Ray Data writes the answers into Parquet files. What it has written it
checkpoints by each question's id, so a start that follows a killed one asks the rest. In the end the answers are joined
into the folder as of any run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.answering import Answerer
from vlmfix.card import versions
from vlmfix.decoders import parse
from vlmfix.errors import DataError, PassingError, SystematicError, UsageError, VlmfixError
from vlmfix.extras import need
from vlmfix.files import make_folder, resolved
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM, load
from vlmfix.images import Found, read_ahead
from vlmfix.jobs.blocks import BlockFolder, named_worker, noted, taken
from vlmfix.jobs.export import COLUMNS, readable
from vlmfix.jobs.folder.job import SPREAD, Named, Progress, Sample, known_settings, prepared, record_of
from vlmfix.jobs.folder.joined import MergedFolder
from vlmfix.jobs.folder.output import Totals, measured
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.ledger import asked_before, facts_of, now
from vlmfix.jobs.lines import ACTOR, ACTORS, ANSWERS, FAILED, QUESTIONS, RAY, ROWS
from vlmfix.jobs.shards import shards_in
from vlmfix.records import read_json, refuse_other, replace_json
from vlmfix.seen import Seen
from vlmfix.settings import Settings
from vlmfix.shapes import OBJECT, fields
from vlmfix.sources import Source
from vlmfix.supply import Question

if TYPE_CHECKING:
    import pyarrow

BLOCK = 256
"""Questions that an actor gets at once, and that are written and checkpointed together."""
ANSWERED = ("image", "sha256", "prompt", "answer", "tokens", "finish", "seconds", "logprob", "entropy")
"""Fields of every answer, in their order."""
PLAIN = {*ANSWERED, "reason"}
"""Fields that a row holds in columns of their own; of a line with others it holds the whole, too."""
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
        task = _Task(known, prompts_file, settings, batch_size, folder.base(source), resolved(out), loader, named)
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


class RayFolder:
    """Reads and writes what a run on Ray keeps below its folder.

    Args:
        out: The run's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / RAY
        self.questions, self.answers, self.checkpoint, self.workers = (
            self.folder / name for name in (QUESTIONS, ROWS, "checkpoint", ACTORS)
        )

    @property
    def is_there(self) -> bool:
        """Whether a run on Ray has begun here."""
        return os.path.isdir(self.folder)

    @staticmethod
    def base(source: Source) -> Path:
        """Returns the folder that names of pictures are relative to."""
        return source.place if os.path.isdir(source.place) else source.place.parent

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder this run's.

        Raises:
            UsageError: It is another run's.
        """
        for folder in (self.answers, self.workers):
            make_folder(folder)
        card = self.folder / "settings.json"
        if os.path.exists(card):
            refuse_other(self.out, card, read_json(card, fields({"settings": OBJECT}))["settings"], settings)
        else:
            replace_json(card, {"settings": settings})

    def plan(self, source: Source, questions: Questions) -> tuple[tuple[str, ...], int]:
        """Writes the questions, a file for every block, and returns some of them and their number.

        Args:
            source: The pictures.
            questions: The prompts.
        """
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        shutil.rmtree(self.questions, ignore_errors=True)
        make_folder(self.questions)
        asked = self._asked(source, questions)
        sample: tuple[str, ...] = ()
        total = 0
        for number in itertools.count():
            rows = list(itertools.islice(asked, BLOCK))
            if not rows:
                return sample, total
            sample = sample or tuple(line for _, line in rows[:SPREAD])
            total += len(rows)
            table = arrow.table({"id": [key for key, _ in rows], "question": [line for _, line in rows]})
            parquet.write_table(table, self.questions / f"{number:08d}.parquet")
        raise AssertionError

    def _asked(self, source: Source, questions: Questions) -> Iterator[tuple[str, str]]:
        """Yields the id of each question, and the question as a line."""
        known, base = Seen(), self.base(source)
        for file in source:
            for prompt in questions.of_picture(file):
                if known.add((file.name, prompt)):
                    yield identity(file.name, prompt), json.dumps(noted(file, [prompt], base))

    def written(self) -> int:
        """Counts the rows of answers and failures that are written."""
        import pyarrow.parquet as parquet

        count = 0
        for path in self.answers.glob("*.parquet"):
            with suppress(Exception):  # one that is being written
                count += parquet.read_metadata(path).num_rows
        return count

    def lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the id and the line of each answer and failure, once.

        Raises:
            DataError: A file is damaged.
        """
        import pyarrow.parquet as parquet

        known = Seen()
        for path in sorted(self.answers.glob("*.parquet")):
            try:
                with parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=BLOCK):
                        for row in batch.to_pylist():
                            if known.add(row["id"]):
                                yield row["id"], _line(row)
            except DataError:
                raise
            except Exception as error:  # Arrow's, of several kinds
                raise DataError(f"{path} is no whole Parquet file: {error}", "restore it") from error

    def cards(self) -> dict[str, dict[str, Any]]:
        """Reads the cards of all actors."""
        return {path.stem: read_json(path, ACTOR) for path in sorted(self.workers.glob("*.json"))}

    def join(self, joined: MergedFolder, total: int, before: int, notes: tuple[str, ...]) -> Progress:
        """Writes the folder as of any run.

        Args:
            joined: The folder.
            total: Questions of the run.
            before: Answers and failures of earlier starts.
            notes: What is to be said of the run.
        """
        cards = self.cards()
        _refuse_other_settings(self.out, cards)
        if not cards:
            raise DataError(f"no actor has begun to answer in {self.out}", "see what the logs of Ray say")
        totals, done = Totals(), 0
        unreadable = Seen()

        def answers() -> Iterator[dict[str, Any]]:
            for _, line in self.lines():
                if "reason" not in line:
                    totals.count(line)
                    yield line

        def failures() -> Iterator[dict[str, Any]]:
            for _, line in self.lines():
                if "reason" in line and ("prompt" in line or unreadable.add(line["image"])):
                    totals.failed += 1
                    yield line

        settings = next(iter(cards.values()))["settings"]
        sessions = [{**card["session"], "worker": name} for name, card in cards.items()]
        joined.card = {
            "settings": settings,
            "started": min(session["started"] for session in sessions),
            "sessions": sorted(sessions, key=lambda session: str(session["started"])),
            "merged": len(cards),
            "updated": now(),
            "finished": False,
            "totals": totals.noted(),
            "notes": list(notes),
        }
        joined.write_card()
        joined.lines[ANSWERS].replace(answers())
        joined.lines[FAILED].replace(failures())
        done = sum(1 for _ in self.lines())
        joined.card |= {
            "updated": now(),
            "finished": done >= total,
            "progress": {"total": total, "left": max(0, total - done), "recent": []},
            "totals": totals.noted(),
            "ms_per_token": totals.noted_pace(),
            "peak_memory": max(session["peak_memory"] for session in sessions),
        }
        joined.write_card()
        return Progress(total, min(before, done), done, totals.answers, totals, BLOCK, notes=notes)


def identity(image: str, prompt: str) -> str:
    """Returns the id of a question: 32 hexadecimal digits of its picture's name and its prompt."""
    text = f"{len(image)}:{image}{prompt}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of an answers' file as a line of a run's."""
    if row["line"]:
        line: dict[str, Any] = json.loads(row["line"])
        return line
    if row["failed"] is not None:
        about = {} if row["prompt"] is None else {"prompt": row["prompt"]}
        return {"image": row["image"], "reason": row["failed"], **about}
    return {name: row[name] for name in ANSWERED}


def _refuse_other_settings(out: Path, cards: Mapping[str, Mapping[str, Any]]) -> None:
    first: Mapping[str, Any] | None = None
    for name, card in cards.items():
        first = first or card["settings"]
        refuse_other(out, out / RAY / ACTORS / f"{name}.json", card["settings"], first)


# -- on the cluster


@dataclass(frozen=True)
class _Task:
    """Holds what an actor needs to know; see ``run_on_ray``.

    Attributes:
        known: Settings that are known before a model is loaded, as a card has them.
        sample: Some questions, as lines.
    """

    known: Mapping[str, Any]
    prompts_file: str | None
    settings: Settings
    batch_size: int | None
    base: Path
    out: Path
    loader: Callable[..., VLM]
    named: Named
    sample: tuple[str, ...] = ()


class Actor:
    """Answers blocks of questions with a model of its own; Ray makes it where there is room, and again when it dies.

    Args:
        task: What it answers with.
    """

    def __init__(self, task: _Task) -> None:
        settings, decoder = task.settings, parse(task.settings.decoder)
        self._base, self._named = task.base, task.named
        sample = [taken(json.loads(line), 0, task.base) for line in task.sample]
        self._sample: list[tuple[Found, str]] = [(file, file.prompts[0]) for file in sample]
        vlm = task.loader(settings.model, **settings.loading())
        rows = task.batch_size
        if rows is None:
            longest = max((prompt for _, prompt in self._sample), key=len, default="")
            rows = fitting_batch(vlm, decoder, settings, typical(sample, [longest]))
        self._answerer = Answerer(vlm, decoder, settings, rows)
        self._opened: dict[str, Found] = {}
        self._totals = {"answers": 0, "failed": 0}
        known = self._answerer.known
        self._card = {
            "settings": {**task.known, **facts_of(known, settings), "decoder_facts": dict(known.facts)},
            "session": {
                "started": now(),
                "device": known.device,
                "batch_size": rows,
                "peak_memory": 0,
                "prompts_file": task.prompts_file,
                "versions": versions(),
                **measured(settings),
            },
        }
        folder = RayFolder(task.out)
        self._place = folder.workers / f"{named_worker()}.json"
        self._write_card()
        _refuse_other_settings(task.out, folder.cards())

    def _write_card(self) -> None:
        self._card["session"]["peak_memory"] = self._answerer.peak_memory
        replace_json(self._place, self._card | {"totals": self._totals, "updated": now()})

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        """Answers a block; questions that trouble of the machine leaves open are missing in what it returns.

        Args:
            block: Columns ``id`` and ``question``.

        Raises:
            SystematicError: Every question fails.
            PassingError: Trouble keeps every question from being answered.
        """
        lines = [taken(json.loads(line), 0, self._base) for line in block.column("question").to_pylist()]
        files = [
            replace(first, prompts=(*first.prompts, *(file.prompts[0] for file in same)))
            for _, same in itertools.groupby(lines, key=lambda file: file.name)
            for first in [next(same)]
        ]
        settled: list[tuple[str, dict[str, Any]]] = []
        with (
            closing(read_ahead(files, batch=self._answerer.ahead)) as pictures,
            closing(self._answerer(self._batches(pictures, settled), self._asked_before)) as answers,
        ):
            for part in answers:
                for sample, outcome in part:
                    file, about = self._opened.pop(sample.image, None), {"image": sample.image}
                    if isinstance(outcome, str):
                        line = {**about, "reason": outcome, "prompt": sample.prompt}
                    elif isinstance(outcome, PassingError):
                        continue
                    else:
                        line = record_of(sample, outcome, self._named)
                        if file is not None:
                            self._sample = [(file, sample.prompt)]
                    settled.append((identity(sample.image, sample.prompt), line))
        for _, line in settled:
            self._totals["failed" if "reason" in line else "answers"] += 1
        self._write_card()
        return _table(settled)

    def _batches(
        self, pictures: Iterable[tuple[Found, Any]], settled: list[tuple[str, dict[str, Any]]]
    ) -> Iterator[list[tuple[Sample, Question | PassingError]]]:
        def samples() -> Iterator[tuple[Sample, Question | PassingError]]:
            for file, picture in pictures:
                for prompt in file.prompts:
                    if isinstance(picture, DataError):
                        failure = {"image": file.name, "reason": str(picture)}
                        settled.append((identity(file.name, prompt), failure))
                    elif isinstance(picture, PassingError):
                        yield Sample(file.name, "", prompt), picture
                    else:
                        self._opened[file.name] = file
                        yield Sample(file.name, picture.sha256, prompt), Question(picture.image, prompt)

        rows = samples()
        while batch := list(itertools.islice(rows, self._answerer.rows)):
            yield batch

    def _asked_before(self) -> Question | None:
        return asked_before(self._sample)


def _table(settled: Sequence[tuple[str, dict[str, Any]]]) -> pyarrow.Table:
    """Makes a table of lines; what a Parquet file cannot hold as it is stands there whole as JSON, too."""
    import pyarrow as arrow

    kinds = {"tokens": arrow.int64(), **dict.fromkeys(("seconds", "logprob", "entropy", "sar"), arrow.float64())}
    rows = []
    for key, line in settled:
        row = {name: line.get(name) for name in COLUMNS} | {"failed": line.get("reason")}
        whole = not line.keys() <= PLAIN or any(
            isinstance(value, str) and not _is_text(value) for value in line.values()
        )
        plain = {name: readable(value) if isinstance(value, str) else value for name, value in row.items()}
        rows.append({"id": key, **plain, "line": json.dumps(line) if whole else None})
    columns = [("id", arrow.string()), *((name, kinds.get(name, arrow.string())) for name in COLUMNS)]
    return arrow.Table.from_pylist(rows, schema=arrow.schema([*columns, ("line", arrow.string())]))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _driven(folder: RayFolder, task: _Task, actors: int, by_gpu: bool) -> None:
    """Lets a task in the cluster drive the work, for Ray Data cannot be driven by a client."""
    import ray

    try:
        ray.get(ray.remote(num_cpus=LIGHT)(_work).remote(folder, task, actors, by_gpu))
    except Exception as error:  # Ray's, which hold those of the task
        raise _told(error) from error


def _work(folder: RayFolder, task: _Task, actors: int, by_gpu: bool) -> None:
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
