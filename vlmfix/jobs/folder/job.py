"""Runs the main job: asks the model about every picture of a folder, and writes every answer as it is done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmfix.answering import Answerer, Outcome
from vlmfix.crew import Crew
from vlmfix.decoders import Decoder, parse
from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM, Answer, check_settings, load
from vlmfix.images import Found, Picture, find, read_ahead
from vlmfix.jobs.folder.maps import MapFolder
from vlmfix.jobs.folder.output import OutputFolder, Totals
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.ledger import asked_before
from vlmfix.jobs.shards import Shard, shards_in
from vlmfix.language.parameters import plain
from vlmfix.settings import Settings
from vlmfix.supply import Question


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
    """

    total: int
    before: int
    done: int
    answered: int
    totals: Totals
    batch_size: int

    @property
    def in_vain(self) -> bool:
        """Returns whether every question of this start failed, or no question of the folder was ever answered."""
        return self.total > 0 and (self.totals.answers == 0 or (self.done > self.before and self.answered == 0))


@dataclass(frozen=True)
class _Sample:
    image: str
    sha256: str
    prompt: str


def run(
    pictures: Path,
    out: Path,
    *,
    questions: Questions,
    settings: Settings,
    batch_size: int | None = None,
    save_maps: Path | None = None,
    retry_failed: bool = False,
    devices: Sequence[str] = (),
    shard: Shard | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    loader: Callable[..., VLM] = load,
) -> Progress:
    """Asks a model about every picture of a folder, and resumes where an earlier start ended.

    It writes ``answers.jsonl``, ``failed.jsonl`` and ``run.json`` into ``out``;
    ``docs/cli.md`` lists their fields.

    Args:
        pictures: A folder, read recursively, or one picture.
        out: The folder to write; made when it is missing.
        questions: The prompts.
        settings: Model, decoder and generation settings.
        batch_size: Rows per batch; None takes as many as the free memory allows. Halved when memory runs out.
        save_maps: A folder for a refining decoder's pictures and maps; see ``MapFolder``.
        retry_failed: Asks the questions again that an earlier start noted in ``failed.jsonl``.
        devices: Torch devices of as many processes, which answer together; empty for one model in this process.
        shard: Asks about this part of the pictures alone, and writes to its folder below ``out``.
        report: Called whenever something was written.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.

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
    if not pictures.exists():
        raise UsageError(f"there is no {pictures}", "give a picture, or a folder with pictures")
    if pictures.is_dir() and out.exists() and out.samefile(pictures):
        raise UsageError(f"{out} is the folder of the pictures", "choose another --out")
    decoder = parse(settings.decoder)
    check_settings(decoder, settings)
    if save_maps is not None:
        _check_maps(save_maps, pictures, decoder, devices)
    files = list(find(pictures, skip=out))
    questions.check(file.name for file in files)
    files = [file for file in files if questions.about_picture(file.name)]
    if not files:
        raise DataError(f"no file in {pictures}", "give a picture, or a folder with pictures")
    if shard is not None:
        _refuse_other_shards(out, shard)
        files = [file for file in files if shard.holds(file.name)]
    with ExitStack() as opened:
        asked = _known_settings(pictures, questions, settings, decoder) | {
            "shard": None if shard is None else str(shard)
        }
        place = out if shard is None else shard.folder(out)
        output = opened.enter_context(OutputFolder(place, asked, retry_failed=retry_failed))
        maps = None if save_maps is None else opened.enter_context(MapFolder(save_maps, asked))
        job = _Job(files, questions, output, maps, report)
        if job.left():
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
    if pictures.is_dir() and folder.resolve().is_relative_to(pictures.resolve()):
        raise UsageError(f"{folder} is in the folder of the pictures", "they would be read as pictures; choose another")


def _known_settings(pictures: Path, questions: Questions, settings: Settings, decoder: Decoder) -> dict[str, Any]:
    """Returns the settings that can be compared before the model is loaded."""
    asked = asdict(settings)
    for name in ("device", "dtype"):  # their values are known only with the model
        del asked[name]
    parameters = {name: plain(value) for name, value in decoder.parameters().items()}
    return {
        "pictures": str(pictures.resolve()),
        **questions.about,
        **asked,
        "decoder": decoder.spec(),
        "decoder_parameters": parameters,
        "plugins": decoder.plugins() or None,
    }


class _Job:
    def __init__(
        self,
        files: Sequence[Found],
        questions: Questions,
        output: OutputFolder,
        maps: MapFolder | None,
        report: Callable[[Progress], None],
    ) -> None:
        self._questions = questions
        self._output = output
        self._maps = maps
        self._report = report
        self._batch_size = 1
        self._answered = 0
        self._paths = {file.name: file.path for file in files if not file.problem}
        self._shown: dict[str, Image.Image] = {}
        self._total = sum(len(questions.about_picture(file.name)) for file in files)
        self._files = [file for file in files if self._open_prompts(file.name)]
        self._before = self._done = self._total - self.left()
        self._note()

    def _open_prompts(self, name: str) -> list[str]:
        if name in self._output.unreadable:
            return []
        return [prompt for prompt in self._questions.about_picture(name) if (name, prompt) not in self._output.done]

    def left(self) -> int:
        """Counts the questions without an answer or a failure."""
        return sum(len(self._open_prompts(file.name)) for file in self._files)

    def progress(self) -> Progress:
        return Progress(self._total, self._before, self._done, self._answered, self._output.totals, self._batch_size)

    def typical(self) -> list[Question]:
        """Returns questions that represent those to come."""
        paths = [file.path for file in self._files if not file.problem]
        return typical(paths, {prompt for file in self._files for prompt in self._open_prompts(file.name)})

    def work(self, answerer: Answerer | Crew, settings: Settings) -> None:
        """Asks every question that is left."""
        self._batch_size = answerer.rows
        self._output.begin(
            answerer.known,
            settings,
            batch_size=answerer.rows,
            prompts_file=self._questions.file_name or None,
            peak_memory=lambda: answerer.peak_memory,
        )
        self._report(self.progress())
        with (
            self._output.working(),
            closing(read_ahead(self._files, batch=answerer.ahead)) as pictures,
            closing(answerer(self._batches(pictures, answerer), self._asked_before)) as answers,
        ):
            for settled in answers:
                for sample, outcome in settled:
                    self._write(sample, outcome)
                self._batch_size = answerer.rows
                self._step(sum(not isinstance(outcome, PassingError) for _, outcome in settled))
            self._output.finish()

    def _batches(
        self, pictures: Iterable[tuple[Found, Picture | DataError | PassingError]], answerer: Answerer | Crew
    ) -> Iterator[list[tuple[_Sample, Question | PassingError]]]:
        samples = self._samples(pictures)
        while batch := list(itertools.islice(samples, answerer.rows)):
            # apart from the samples: these wait with their failures, and their pictures would fill the memory
            self._shown = {sample.image: shown for sample, shown in batch if not isinstance(shown, PassingError)}
            yield [
                (sample, shown if isinstance(shown, PassingError) else Question(shown, sample.prompt))
                for sample, shown in batch
            ]

    def _samples(
        self, pictures: Iterable[tuple[Found, Picture | DataError | PassingError]]
    ) -> Iterator[tuple[_Sample, Image.Image | PassingError]]:
        for file, picture in pictures:
            prompts = self._open_prompts(file.name)
            if isinstance(picture, DataError):
                self._output.fail(file.name, str(picture))
                self._step(len(prompts))
            elif isinstance(picture, PassingError):
                yield from ((_Sample(file.name, "", prompt), picture) for prompt in prompts)
            else:
                yield from ((_Sample(file.name, picture.sha256, prompt), picture.image) for prompt in prompts)

    def _asked_before(self) -> Question | None:
        """Returns a question that this folder has an answer to."""
        answered = self._output.answered()
        return asked_before((self._paths[image], prompt) for image, prompt in answered if image in self._paths)

    def _note(self) -> None:
        self._output.asked, self._output.left = self._total, self._total - self._done

    def _step(self, count: int) -> None:
        self._done += count
        self._note()
        self._output.save_in_time()
        self._report(self.progress())

    def _write(self, sample: _Sample, outcome: Outcome) -> None:
        if isinstance(outcome, PassingError):
            self._output.left_open.append((f"about {sample.image}", outcome))
            return
        if isinstance(outcome, str):
            self._output.fail(sample.image, outcome, prompt=sample.prompt)
            return
        if self._maps is not None and outcome.refined is not None:
            self._maps.save(sample.image, self._shown[sample.image], sample.prompt, outcome.refined)
        self._output.answer(_record(sample, outcome))
        self._answered += 1


def _record(sample: _Sample, answer: Answer) -> dict[str, Any]:
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
    }
