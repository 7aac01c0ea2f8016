"""Runs the main job: asks the model about every picture of a folder, and writes every answer as it is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlmfix.answering import Answerer, Outcome
from vlmfix.crew import Crew
from vlmfix.decoders import Decoder, parse
from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.files import resolved
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM, Answer, check_settings, load
from vlmfix.images import Found, Picture, read_ahead
from vlmfix.insight.relevance import Confidence, flags
from vlmfix.jobs.blocks import BlockFolder
from vlmfix.jobs.folder.batches import Sample, batches
from vlmfix.jobs.folder.maps import MapFolder
from vlmfix.jobs.folder.output import OutputFolder, Totals
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.folder.suspects import chunks, prove, stretches
from vlmfix.jobs.journal import DIED
from vlmfix.jobs.ledger import asked_before
from vlmfix.jobs.shards import Shard, shards_in
from vlmfix.kinds import kind_named
from vlmfix.language.parameters import plain
from vlmfix.parsing import WORD
from vlmfix.seen import Seen
from vlmfix.settings import Settings
from vlmfix.sources import Source, source_of
from vlmfix.supply import Question

Named = Callable[[str], Sequence[tuple[str, int, int]]]
"""Finds the object words of a text: what each names, and its begin and end."""
MEASURED = ("words", "confidence", "similarity")
"""Settings that decide what is told of an answer, and no answer."""
SPREAD = 8
"""Pictures, spread over all, at which every second one is let go of those that represent the others."""


@dataclass(frozen=True)
class Progress:
    """Says how far a run is.

    Attributes:
        total: Questions altogether: pictures times prompts.
        before: Questions answered or failed in earlier starts.
        done: Questions answered or failed so far, earlier starts included.
        answered: Questions that this start answered.
        totals: Totals of the output folder.
        batch_size: Rows per batch at present.
        peak_memory: Most bytes held so far, on the model's device; 0 before it is loaded.
        notes: What is to be said of the run.
    """

    total: int
    before: int
    done: int
    answered: int
    totals: Totals
    batch_size: int
    peak_memory: int = 0
    notes: tuple[str, ...] = ()

    @property
    def in_vain(self) -> bool:
        """Returns whether every question of this start failed, or no question of the folder was ever answered."""
        return self.total > 0 and (self.totals.answers == 0 or (self.done > self.before and self.answered == 0))


def run(
    pictures: Path,
    out: Path,
    *,
    questions: Questions,
    settings: Settings,
    column: str | None = None,
    batch_size: int | None = None,
    save_maps: Path | None = None,
    retry_failed: bool = False,
    devices: Sequence[str] = (),
    shard: Shard | None = None,
    remarks: Callable[[Iterable[Found]], Sequence[str]] = lambda files: (),
    report: Callable[[Progress], None] = lambda progress: None,
    loader: Callable[..., VLM] = load,
    named: Named = lambda text: (),
) -> Progress:
    """Asks a model about every picture of a source, and resumes where an earlier start ended.

    It writes ``answers.jsonl``, ``failed.jsonl`` and ``run.json`` into ``out``;
    ``docs/cli.md`` lists their fields.

    Args:
        pictures: A folder, read recursively, one picture, a list of paths, a CSV file or a tar file; see ``source_of``.
        out: The folder to write; made when it is missing.
        questions: The prompts.
        settings: Model, decoder and generation settings.
        column: Column of the paths in a CSV file; None for ``image`` or ``path``.
        batch_size: Rows per batch; None takes as many as the free memory allows. Halved when memory runs out.
        save_maps: A folder for a refining decoder's pictures and maps; see ``MapFolder``.
        retry_failed: Asks the questions again that an earlier start noted in ``failed.jsonl``.
        devices: Torch devices of as many processes, which answer together; empty for one model in this process.
        shard: Asks about this part of the pictures alone, and writes to its folder below ``out``.
        remarks: Called with the files before the model is loaded; the card and the final state keep what it returns.
        report: Called whenever something was written.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.
        named: Finds the object words of an answer, for flags.

    Returns:
        The final state.

    Raises:
        UsageError: A setting is not allowed, a question names a picture that is not there, ``out``
            belongs to another run, or ``save_maps`` is given to a decoder that makes none, or with ``devices``.
        DataError: The pictures' folder or ``out`` cannot be used.
        UnsupportedModelError: The model cannot be used.
        SystematicError: Every question fails; nothing is noted about the last failures.
        PassingError: Trouble of the machine left questions open, which the next start asks; nothing is noted of them.
    """
    source, decoder = prepared(pictures, out, questions=questions, settings=settings, column=column)
    if save_maps is not None:
        _check_maps(save_maps, pictures, decoder, devices)
    questions.check(source)
    if not any(questions.of_picture(file) for file in source):
        raise DataError(f"no file in {pictures}", "give a picture, or a folder with pictures")
    if shard is not None:
        _refuse_other_shards(out, shard)
        if BlockFolder(out).is_there:
            raise UsageError(f"workers share the run in {out}", "choose another --out, or --steal")
    with ExitStack() as opened:
        asked = known_settings(source, questions, settings, decoder, shard)
        place = out if shard is None else shard.folder(out)
        output = opened.enter_context(OutputFolder(place, asked, retry_failed=retry_failed))
        output.notes = tuple(remarks(source))
        maps = None if save_maps is None else opened.enter_context(MapFolder(save_maps, asked))
        job = _Job(source, shard, questions, output, maps, report, named)
        if job.left:
            if devices:
                sample = job.typical() if batch_size is None else []
                job.work(opened.enter_context(Crew(devices, settings, batch_size, sample, loader)), settings)
            else:
                vlm = loader(settings.model, **settings.loading())
                rows = fitting_batch(vlm, decoder, settings, job.typical()) if batch_size is None else batch_size
                job.work(Answerer(vlm, decoder, settings, rows), settings)
        else:
            output.conclude()
        return job.progress()


def prepared(
    pictures: Path, out: Path, *, questions: Questions, settings: Settings, column: str | None
) -> tuple[Source, Decoder]:
    """Makes a run's source and decoder, after it has checked what can be before anything is read.

    Raises:
        UsageError: A setting is not allowed, the pictures are not there, or ``out`` is their folder.
    """
    if not os.path.exists(pictures):
        kind = kind_named(pictures.name)
        raise UsageError(
            f"{pictures}: {kind}" if kind else f"there is no {pictures}",
            "give a picture, a folder of them, or a list (.txt, .csv), also of URLs",
        )
    if os.path.isdir(pictures) and os.path.exists(out) and out.samefile(pictures):
        raise UsageError(f"{out} is the folder of the pictures", "choose another --out")
    decoder = parse(settings.decoder)
    check_settings(decoder, settings)
    source = source_of(pictures, column=column, skip=out)
    if source.prompts is not None and not questions.tabled:
        raise UsageError(f"{pictures} has a column of prompts", "ask these, by Questions.of")
    return source, decoder


def _refuse_other_shards(out: Path, shard: Shard) -> None:
    if others := [str(other) for other in shards_in(out) if other.count != shard.count]:
        raise UsageError(
            f"{out} holds the shard {others[0]}, and {shard} would ask about the same pictures",
            f"choose another --out, or shards of {others[0].partition('/')[2]}",
        )


def _check_maps(folder: Path, pictures: Path, decoder: Decoder, devices: Sequence[str]) -> None:
    if devices:
        raise UsageError("--save-maps does not go with --devices", "save the maps on one device")
    if not decoder.refines:
        raise UsageError(f"{decoder.name} makes no maps to save", "use carve or vicrop, or leave --save-maps out")
    if os.path.isdir(pictures) and resolved(folder).is_relative_to(resolved(pictures)):
        raise UsageError(f"{folder} is in the folder of the pictures", "they would be read as pictures; choose another")


def known_settings(
    source: Source, questions: Questions, settings: Settings, decoder: Decoder, shard: Shard | None
) -> dict[str, Any]:
    """Returns the settings that can be compared before the model is loaded, as a card has them."""
    asked = asdict(settings) | settings.requested()
    for name in ("device", "dtype", *MEASURED):  # the values of the first two are known only with the model
        del asked[name]
    parameters = {name: plain(value) for name, value in decoder.parameters().items()}
    return {
        "pictures": str(resolved(source.place)),
        "column": source.column,
        "shard": None if shard is None else str(shard),
        **questions.about,
        **asked,
        "decoder": decoder.spec(),
        "decoder_parameters": parameters,
        "plugins": decoder.plugins() or None,
    }


class _Job:
    """Asks what is left of a run's questions.

    The source is read twice, once to count and once to ask; nothing is kept of its pictures but a few that represent
    all. What is kept of every question is that it was asked: with the answers of a long run, resumption has to know
    that anyway.
    """

    def __init__(
        self,
        source: Source,
        shard: Shard | None,
        questions: Questions,
        output: OutputFolder,
        maps: MapFolder | None,
        report: Callable[[Progress], None],
        named: Named,
    ) -> None:
        self._source = source
        self._shard = shard
        self._questions = questions
        self._output, self._journal = output, output.journal
        self._maps = maps
        self._report = report
        self._named = named
        self._batch_size = 1
        self._peak_memory: Callable[[], int] = lambda: 0
        self._answered = 0
        self._shown: dict[str, Image.Image | None] = {}
        self._unreadable = output.unreadable.copy()
        self._sample: list[Found] = []
        self._longest = ""
        self._total = self.left = 0
        """``left``: questions that had neither answer nor failure when the source was counted."""
        self._count()
        self._before = self._done = self._total - self.left
        self._note()

    def _files(self) -> Iterator[Found]:
        return (file for file in self._source if self._shard is None or self._shard.holds(file.name))

    def _is_open(self, name: str, prompt: str) -> bool:
        return name not in self._unreadable and (name, prompt) not in self._output.done

    def _count(self) -> None:
        """Counts the questions, each once, however often the source names its picture; keeps some pictures of all."""
        known = Seen()  # let go at the end, before the first answer adds to what is done
        suspects: set[str] = set()
        stride = passed = 0
        for file in self._files():
            open_before = self.left
            for prompt in self._questions.of_picture(file):
                if self._source.repeats and not known.add((file.name, prompt)):
                    continue
                self._total += 1
                if self._is_open(file.name, prompt):
                    self.left += 1
                    self._longest = max(self._longest, prompt, key=len)
            if self.left > open_before and self._journal.deaths(file.name) is not None:
                suspects.add(file.name)
            if self.left == open_before or file.problem:
                continue
            if passed % (1 << stride) == 0:
                self._sample.append(file)
            passed += 1
            if len(self._sample) == SPREAD:
                self._sample, stride = self._sample[::2], stride + 1
        self._journal.keep(suspects)

    def progress(self) -> Progress:
        output = self._output
        return Progress(
            self._total,
            self._before,
            self._done,
            self._answered,
            output.totals,
            self._batch_size,
            self._peak_memory(),
            output.notes,
        )

    def typical(self) -> list[Question]:
        """Returns questions that represent those to come, none of them about a suspect."""
        sample = [file for file in self._sample if self._journal.deaths(file.name) is None]
        self._journal.begin([file.name for file in sample])
        return typical(sample, [self._longest])

    def _open_files(self) -> Iterator[Found]:
        """Yields the pictures with their open questions, which are noted as asked: each is asked once in a start.

        Those on which a process died alone come last, so that as much as can be is answered before another one dies.
        """
        asked, late = 0, []
        for file in self._files():
            prompts = tuple(prompt for prompt in self._questions.of_picture(file) if self._is_open(file.name, prompt))
            if not prompts:
                continue
            for prompt in prompts:
                self._output.done.add((file.name, prompt))
            asked += len(prompts)
            self._total = max(self._total, self._before + asked)  # pictures that were added since they were counted
            if self._journal.is_given_up(file.name):
                for prompt in prompts:
                    self._output.fail(file.name, DIED, prompt=prompt)
                self._journal.settle(file.name)
                self._step(len(prompts))
            elif self._journal.is_doubtful(file.name):
                late.append(replace(file, prompts=prompts))
            else:
                yield replace(file, prompts=prompts)
        yield from late

    def work(self, answerer: Answerer | Crew, settings: Settings) -> None:
        """Asks every question that is left."""
        self._batch_size, self._peak_memory = answerer.rows, lambda: answerer.peak_memory
        self._output.begin(
            answerer.known,
            settings,
            batch_size=answerer.rows,
            prompts_file=self._questions.file_name or None,
            peak_memory=self._peak_memory,
        )
        self._report(self.progress())
        with self._output.working():
            for files in stretches(
                chunks(self._open_files(), answerer.ahead),
                most=answerer.rows,
                deaths=lambda file: self._journal.deaths(file.name),
                begin=lambda files, apart: self._begin(files, apart, answerer),
            ):
                self._answer(files, answerer)
            self._output.finish()

    def _begin(self, files: Sequence[Found], apart: bool, answerer: Answerer | Crew) -> None:
        if not self._answered and any(self._journal.is_doubtful(file.name) for file in files):
            prove(answerer, self._asked_before)
        self._journal.begin([file.name for file in files], apart=apart)

    def _answer(self, files: Iterable[Found], answerer: Answerer | Crew) -> None:
        with (
            closing(read_ahead(files, batch=answerer.ahead)) as pictures,
            closing(answerer(self._batches(pictures, answerer), self._asked_before)) as answers,
        ):
            for settled in answers:
                for sample, outcome in settled:
                    self._write(sample, outcome)
                self._batch_size = answerer.rows
                self._step(sum(not isinstance(outcome, PassingError) for _, outcome in settled))

    def _batches(
        self, pictures: Iterable[tuple[Found, Picture | DataError | PassingError]], answerer: Answerer | Crew
    ) -> Iterator[list[tuple[Sample, Question | PassingError]]]:
        for batch in batches(pictures, answerer, self._unopened):
            self._shown = {sample.image: asked.picture for sample, asked in batch if isinstance(asked, Question)}
            yield batch

    def _unopened(self, file: Found, reason: str) -> None:
        if file.name not in self._output.unreadable:
            self._output.fail(file.name, reason)
        self._journal.settle(file.name)
        self._step(len(file.prompts))

    def _asked_before(self) -> Question | None:
        """Returns a question that this folder has an answer to."""
        answered = dict(self._output.answered())
        return asked_before((file, answered[file.name]) for file in self._files() if file.name in answered)

    def _note(self) -> None:
        self._output.asked, self._output.left = self._total, self._total - self._done

    def _step(self, count: int) -> None:
        self._done += count
        self._note()
        self._output.save_in_time()
        self._report(self.progress())

    def _write(self, sample: Sample, outcome: Outcome) -> None:
        if isinstance(outcome, PassingError):
            self._output.left_open.append((f"about {sample.image}", outcome))
            self._journal.leave([sample.image])
            return
        if isinstance(outcome, str):
            self._output.fail(sample.image, outcome, prompt=sample.prompt)
        else:
            if self._maps is not None and outcome.refined is not None:
                shown = self._shown[sample.image]
                assert shown is not None
                self._maps.save(sample.image, shown, sample.prompt, outcome.refined)
            self._output.answer(record_of(sample, outcome, self._named))
            self._answered += 1
        if sample.is_last:
            self._journal.settle(sample.image)


def record_of(sample: Sample, answer: Answer, named: Named) -> dict[str, Any]:
    """Returns an answer as a line of ``answers.jsonl``.

    Args:
        sample: The question.
        answer: Its answer.
        named: Finds the object words of a text.
    """
    words = {}
    if answer.words is not None:
        words = {"words": [[begin, end, round(logprob, 3)] for begin, end, logprob in answer.words]}
    return {
        "image": sample.image,
        "sha256": sample.sha256,
        "prompt": sample.prompt,
        "answer": answer.text,
        "tokens": answer.tokens,
        "finish": answer.finish,
        "seconds": round(answer.seconds, 4),
        "logprob": None if answer.logprob is None else round(answer.logprob, 4),
        "entropy": None if answer.entropy is None else round(answer.entropy, 4),
        **({} if answer.skipped is None else {"skipped": answer.skipped}),
        **words,
        **({} if answer.confidence is None else _scored(answer.text, answer.confidence, named)),
    }


def _scored(text: str, confidence: Confidence, named: Named) -> dict[str, Any]:
    """Returns what a line says of the tokens' uncertainty, and with grounding of the object words."""
    grounded = any(token.picture is not None for token in confidence.tokens)
    scored = [
        [
            token.begin,
            token.end,
            *(round(number, 4) for number in (token.logprob, token.entropy, token.sar)),
            *([_rounded(token.picture)] if grounded else []),
        ]
        for token in confidence.tokens
    ]
    found: dict[str, Any] = {"sar": round(confidence.sar, 4), "scored": scored}
    if grounded:
        objects = named(text)
        places = [(begin, end) for _, begin, end in objects]
        flagged = flags(confidence, [word.span() for word in WORD.finditer(text)], places)
        found["objects"] = []
        for (name, begin, end), flag in zip(objects, flagged, strict=True):
            unsure, owed = confidence.of(begin, end)
            known = {"word": name, "begin": begin, "end": end, "sar": round(unsure, 4), "picture": _rounded(owed)}
            found["objects"].append(known | {"flagged": flag})
    return found


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 6)
