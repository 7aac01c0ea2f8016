"""Runs several decoders over one workload, every sample through every arm, and resumes after any kill.

A resumed run equals an uninterrupted one, byte for byte: the order of the questions and the partition into batches
follow from the samples and the batch size alone, the card keeps the batch size, a batch that was cut off is answered
again as a whole, and answers hold nothing that depends on the clock.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from vlmfix.answering import Answerer, Outcome
from vlmfix.card import known, peak_memory, refuse_other_pictures
from vlmfix.decoders import Decoder, Greedy
from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.evals.record import PLAIN, EvalRun, read_run
from vlmfix.evals.task import Sample, Task, Workload
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM, Answer, check_settings, load
from vlmfix.images import Found, Picture, read_ahead
from vlmfix.jobs.benchmark.output import ArmsFolder
from vlmfix.jobs.ledger import asked_before
from vlmfix.parsing import some
from vlmfix.settings import Settings
from vlmfix.supply import Question

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class _Asked:
    """Holds one question and the samples that it answers; the same question may be in several splits.

    Attributes:
        image: The picture's name; None for a prompt alone.
        prompt: The question.
        samples: The samples that its answer is for.
        sha256: Hex digest of the picture's file, once it has been opened.
    """

    image: str | None
    prompt: str
    samples: tuple[Sample, ...]
    sha256: str = ""


def evaluate(
    out: Path,
    task: Task,
    workload: Workload,
    settings: Settings,
    arms: Mapping[str, Decoder],
    *,
    batch_size: int | None = None,
    retry_failed: bool = False,
    command: str = "",
    report: Report = lambda done, total: None,
    loader: Callable[..., VLM] = load,
) -> EvalRun:
    """Asks every question of a workload with every decoder, and resumes where an earlier start ended.

    It writes ``card.json``, ``samples.jsonl`` and, for each arm, ``<arm>/answers.jsonl`` into ``out``. The same
    question about the same picture is asked once, however many samples share it. Arms that a folder already has
    stay; new ones are added.

    Args:
        out: The folder; made when it is missing.
        task: The rules of scoring.
        workload: Samples and pictures.
        settings: Model and generation settings; its ``decoder`` is not read.
        arms: Decoders by name; the plain one is added when it is not among them.
        batch_size: Rows per batch; None takes the folder's batch size, or as many as the free memory allows.
        retry_failed: Asks questions again that an earlier start recorded as failed; their lines leave the folder when
            the model is loaded, and the new lines follow the others.
        command: Shell command that starts the same run, for the card.
        report: Called with the samples done and their total, over all arms, when a batch has been written.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.

    Returns:
        The finished run.

    Raises:
        UsageError: The folder holds another run, another process writes there, or a decoder cannot act on the model or
            contradicts the settings.
        IncompatibleDecodersError: The settings ask for beams and a decoder does not work with them.
        DataError: There is no sample, two share an id, or pictures are missing, not in the folder or not those that
            the folder has answers about.
        SystematicError: Every question fails; nothing is recorded about the last failures.
        PassingError: Trouble of the machine left samples open, which the next start asks; nothing is recorded of them.
    """
    check(workload)
    if not isinstance(arms.get(PLAIN, Greedy()), Greedy):
        raise UsageError(f"an arm called {PLAIN} is {arms[PLAIN].spec()}", f"{PLAIN} is plain decoding; rename the arm")
    arms = {PLAIN: Greedy(), **arms}
    for decoder in arms.values():
        check_settings(decoder, settings)
    with ArmsFolder(out, task, workload, settings, arms, command, retry_failed=retry_failed) as output:
        job = _Job(workload, output, arms, report)
        if job.left:
            refuse_changed(out, workload, output.pictures())
            vlm = loader(settings.model, **settings.loading())
            _refuse_idle(vlm, settings.model, arms)
            rows = batch_size or output.batch_size
            if not rows:
                sample = job.typical()
                rows = min(fitting_batch(vlm, decoder, settings, sample) for decoder in arms.values())
            models = {arm: known(vlm, decoder) for arm, decoder in arms.items()}
            output.begin(models, settings, batch_size=rows, peak_memory=lambda: peak_memory(vlm.device))
            with output.working():
                for arm, decoder in arms.items():
                    job.work(arm, Answerer(vlm, decoder, settings, rows))
    return replace(read_run(out), asked_now=job.asked, answered_now=job.answered)


def check(workload: Workload) -> None:
    """Checks a workload for what would stop a run, before any model is loaded.

    Raises:
        DataError: There is no sample, two share an id, or pictures are missing or not in the folder.
    """
    samples = workload.samples
    if not samples:
        raise DataError("there is nothing to ask", "the questions, the list or --count leave no sample")
    if len({sample.id for sample in samples}) < len(samples):
        twice = Counter(sample.id for sample in samples).most_common(1)[0][0]
        raise DataError(f"two samples have the id {twice!r}", "ids must be unique within a run")
    names = dict.fromkeys(sample.image for sample in samples if sample.image is not None)
    if names and workload.images is None:
        raise DataError("the samples name pictures, but no folder of pictures is given", "give --images DIR")
    outside = [name for name in names if PurePath(name).is_absolute() or ".." in PurePath(name).parts]
    if outside:
        raise DataError(
            f"{len(outside)} of {len(names)} pictures have names that lead out of {workload.images}: {some(outside)}",
            "name pictures as they lie below the folder; links in the folder are followed",
        )
    missing = [name for name in names if not os.path.isfile(_path(workload, name))]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} pictures are not in {workload.images}: {some(missing)}",
            "give the folder that holds them with --images",
        )


def refuse_changed(out: Path, workload: Workload, known: Mapping[str, str]) -> None:
    """Checks that the pictures are those that a run's answers are about.

    Args:
        out: The run's folder, for the message.
        workload: The samples, with the folder of the pictures.
        known: Digests of the pictures that the run has answers about, by name.

    Raises:
        DataError: Some have another content.
    """
    names = dict.fromkeys(sample.image for sample in workload.samples if sample.image is not None)
    files = [Found(name, _path(workload, name)) for name in names]
    hint = "give the folder of the same pictures with --images, or choose another --out"
    refuse_other_pictures(out, workload.images, files, known, hint=hint)


def _refuse_idle(vlm: VLM, model: str, arms: Mapping[str, Decoder]) -> None:
    """Refuses decoders that cannot act on the model, before the folder's card names them."""
    for name, decoder in arms.items():
        if reason := decoder.check(vlm):
            raise UsageError(f"{name} cannot act on {model}: {reason}", "leave that decoder out")


def _path(workload: Workload, name: str) -> Path:
    return (workload.images or Path()) / name


def _questions(samples: Sequence[Sample]) -> list[_Asked]:
    """Lists the distinct questions in order of first mention, with those about one picture together."""
    by_picture: dict[str | None, dict[str, list[Sample]]] = {}
    for sample in samples:
        by_picture.setdefault(sample.image, {}).setdefault(sample.prompt, []).append(sample)
    return [
        _Asked(image, prompt, tuple(found))
        for image, prompts in by_picture.items()
        for prompt, found in prompts.items()
    ]


class _Job:
    """Asks every question of a workload in every arm.

    Attributes:
        asked: Samples that this start has written.
        answered: Samples among them that have an answer.
    """

    def __init__(self, workload: Workload, output: ArmsFolder, arms: Iterable[str], report: Report) -> None:
        self._workload = workload
        self._questions = _questions(workload.samples)
        self._output = output
        self._report = report
        open_samples = [len(workload.samples) - len(output.done[arm]) for arm in arms]
        self.left = sum(open_samples)
        """Samples without a record, over all arms."""
        self._total = len(open_samples) * len(workload.samples)
        self._tokens = 0
        self.asked = self.answered = 0

    def typical(self) -> list[Question]:
        """Returns questions that represent all."""
        names = dict.fromkeys(asked.image for asked in self._questions if asked.image is not None)
        files = [Found(name, _path(self._workload, name)) for name in names]
        return typical(files, (asked.prompt for asked in self._questions))

    def work(self, arm: str, answerer: Answerer) -> None:
        """Answers the open questions of an arm."""
        done, size = self._output.done[arm], answerer.rows  # before memory runs out, which makes it smaller
        batches = [self._questions[start : start + size] for start in range(0, len(self._questions), size)]
        open_batches = [b for b in batches if any(s.id not in done for asked in b for s in asked.samples)]
        if not open_batches:
            return
        names = dict.fromkeys(a.image for batch in open_batches for a in batch if a.image is not None)
        found = (Found(name, _path(self._workload, name)) for name in names)
        started, self._tokens = time.perf_counter(), 0
        try:
            with (
                closing(read_ahead(found, batch=size)) as pictures,
                closing(answerer(_shown(open_batches, pictures), lambda: self._asked_before(arm))) as answers,
            ):
                for settled in answers:
                    before = self._total - self.left
                    for asked, outcome in settled:
                        self._write(arm, asked, outcome)
                    self._output.note(arm, self._tokens, time.perf_counter() - started)
                    self._output.save_in_time()
                    for number in range(before, self._total - self.left):  # only now: a report may end the run
                        self._report(number + 1, self._total)
        finally:
            self._output.note(arm, self._tokens, time.perf_counter() - started)

    def _asked_before(self, arm: str) -> Question | None:
        """Returns a question that this arm has an answer to."""
        answered = self._output.answered(arm)
        return asked_before(
            (None if asked.image is None else Found(asked.image, _path(self._workload, asked.image)), asked.prompt)
            for asked in self._questions
            if any(sample.id in answered for sample in asked.samples)
        )

    def _write(self, arm: str, asked: _Asked, outcome: Outcome) -> None:
        done = self._output.done[arm]
        samples = [sample for sample in asked.samples if sample.id not in done]
        if isinstance(outcome, PassingError):
            self._output.left_open += [(sample.id, outcome) for sample in samples]
            return
        if isinstance(outcome, Answer):  # written or not: rows of a batch that was cut off are answered again
            self._tokens += len(asked.samples) * len(outcome.ids)
        for sample in samples:
            self._output.write(arm, _line(sample, asked.sha256, outcome))
            self.asked += 1
            self.answered += isinstance(outcome, Answer)
            self.left -= 1


def _shown(
    batches: Iterable[Sequence[_Asked]], pictures: Iterator[tuple[Found, Picture | DataError | PassingError]]
) -> Iterator[list[tuple[_Asked, Question | str | PassingError]]]:
    """Yields batches with their pictures opened, which come in the order of first mention."""
    shown: dict[str, Picture | DataError | PassingError] = {}
    for batch in batches:
        needed = {asked.image for asked in batch if asked.image is not None}
        shown = {name: picture for name, picture in shown.items() if name in needed}
        while needed - shown.keys():
            file, picture = next(pictures)
            shown[file.name] = picture
        yield [_question(asked, None if asked.image is None else shown[asked.image]) for asked in batch]


def _question(
    asked: _Asked, picture: Picture | DataError | PassingError | None
) -> tuple[_Asked, Question | str | PassingError]:
    if isinstance(picture, PassingError):
        return asked, picture
    if isinstance(picture, DataError):
        return asked, str(picture)
    if picture is None:
        return asked, Question(None, asked.prompt)
    return replace(asked, sha256=picture.sha256), Question(picture.image, asked.prompt)


def _line(sample: Sample, sha256: str, outcome: Answer | str) -> dict[str, Any]:
    about: dict[str, Any] = {"id": sample.id, "image": sample.image}
    if sha256:
        about["sha256"] = sha256
    if isinstance(outcome, str):
        return about | {"failed": outcome}
    said = {"answer": outcome.text, "ids": list(outcome.ids), "finish": outcome.finish}
    return about | said | ({} if outcome.skipped is None else {"skipped": outcome.skipped})
