"""Several decoders over one workload: every sample through every arm, resumed after any kill.

What makes a resumed run equal to an uninterrupted one, byte for byte: the order of the questions and the partition
into batches follow from the samples and the batch size alone, the batch size is kept in the card, a batch that was
cut off is answered again as a whole, and nothing that depends on the clock stands in the answers.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from vlmfix.answering import Answerer
from vlmfix.card import (
    changed_pictures,
    device_name,
    model_files,
    peak_memory,
    plain,
    refuse_older_card,
    versions,
    weights_digest,
)
from vlmfix.decoders import Decoder, Greedy
from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.evals.record import (
    ANSWERS,
    CARD,
    COMPARISON,
    FORMAT,
    LINE,
    PLAIN,
    REPORT,
    RESULTS,
    SAMPLES,
    SCORABLE,
    SESSION,
    EvalRun,
    arm_folder,
    checked,
    digest,
    read_run,
    without_names,
    write_samples,
)
from vlmfix.evals.task import Sample, Task, Workload
from vlmfix.files import make_folder, remove_drafts
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM, Answer, check_settings, load
from vlmfix.images import Found, Picture, open_picture, read_ahead
from vlmfix.models.checkpoint import EMBEDDED
from vlmfix.parsing import some
from vlmfix.records import JsonLines, read_json, read_lines, refuse_other, replace_json
from vlmfix.settings import Settings
from vlmfix.shapes import fault, fields, list_of
from vlmfix.supply import Question

CARD_SECONDS = 30.0
"""The card is at most this old while the run goes on."""

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class _Asked:
    """One question, and the samples that it answers: a picture's question may stand in several splits.

    Attributes:
        image: The picture's name; None for a prompt alone.
        prompt: What is asked.
        samples: What the answer stands for.
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
    """Ask every question of a workload with every decoder; go on where an earlier start ended.

    Writes ``card.json``, ``samples.jsonl`` and, for each arm, ``<arm>/answers.jsonl`` into ``out``. The same question
    about the same picture is asked once, whatever number of samples it stands for. Arms that a folder already has
    stay; new ones are added.

    Args:
        out: The folder; made when it is missing.
        task: The rules of scoring.
        workload: Samples and pictures.
        settings: Model and generation settings; its ``decoder`` is not read.
        arms: Decoders by name; the plain one is added when it is not among them.
        batch_size: Rows at a time; None takes as many as the free memory allows, or what the folder was begun with.
        retry_failed: Asks again what an earlier start recorded as failed; its lines leave the folder when the model is
            there, and what is found now stands behind the others.
        command: How to start the same run from a shell, for the card.
        report: Called with the samples done and their total, over all arms.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.

    Returns:
        The finished run.

    Raises:
        UsageError: The folder holds another run, another process writes there, or a decoder cannot act on the model or
            contradicts the settings.
        IncompatibleDecodersError: The settings ask for beams and a decoder does not work with them.
        DataError: There is no sample, two share an id, or pictures are missing, not in the folder or not those that
            the folder has answers about.
        SystematicError: Every question fails; nothing is recorded about those that failed in the end.
        PassingError: Trouble of the machine left samples open, which the next start asks; nothing is recorded of them.
    """
    check(workload)
    if not isinstance(arms.get(PLAIN, Greedy()), Greedy):
        raise UsageError(f"an arm called {PLAIN} is {arms[PLAIN].spec()}", f"{PLAIN} is plain decoding; rename the arm")
    arms = {PLAIN: Greedy(), **arms}
    for decoder in arms.values():
        check_settings(decoder, settings)
    with _Folder(out, task, workload, settings, arms, command, retry_failed=retry_failed) as folder:
        left = {arm: folder.left(arm) for arm in arms}
        if any(left.values()):
            refuse_changed(out, workload, folder.pictures())
            vlm = loader(settings.model, **settings.loading())
            _refuse_idle(vlm, settings.model, arms)
            folder.begin(vlm, settings, arms, batch_size, workload)
            total = len(workload.samples) * len(arms)
            done = itertools.count(total - sum(left.values()) + 1)
            for arm, decoder in arms.items():
                answerer = Answerer(vlm, decoder, settings, folder.batch_size)
                for _ in folder.work(arm, answerer, workload, vlm):
                    report(next(done), total)
            folder.save()
            folder.refuse_open()
    return replace(read_run(out), asked_now=folder.asked, answered_now=folder.answered)


def check(workload: Workload) -> None:
    """Find what would stop a run before any model is loaded.

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
    """Make sure that the pictures are those that a run's answers are about.

    Args:
        out: The run's folder, for the message.
        workload: What is asked, with the folder of the pictures.
        known: Digests of the pictures that the run has answers about, by name.

    Raises:
        DataError: Some have another content.
    """
    names = dict.fromkeys(sample.image for sample in workload.samples if sample.image is not None)
    files = {name: _path(workload, name) for name in names}
    if changed := changed_pictures(files, known):
        raise DataError(
            f"{len(changed)} of {len(files)} pictures in {workload.images} are not those that the answers in {out} are "
            f"about: {some(changed)}",
            "give the folder of the same pictures with --images, or choose another --out",
        )


def _refuse_idle(vlm: VLM, model: str, arms: Mapping[str, Decoder]) -> None:
    """Refuses decoders that cannot act on the model, before the folder knows them."""
    for name, decoder in arms.items():
        if reason := decoder.check(vlm):
            raise UsageError(f"{name} cannot act on {model}: {reason}", "leave that decoder out")


def _refuse_shared_folders(arms: Iterable[str]) -> None:
    """Refuses arms whose answers would lie in one place, or in that of another file of the run."""
    taken = dict.fromkeys((CARD, SAMPLES, RESULTS, REPORT), "a file of the run")
    for name in arms:
        folder = arm_folder(name)
        if folder in taken:
            raise UsageError(f"the arm {name} and {taken[folder]} would share the folder {folder}", "rename the arm")
        taken[folder] = f"the arm {name}"


def _path(workload: Workload, name: str) -> Path:
    return (workload.images or Path()) / name


def _questions(samples: Sequence[Sample]) -> list[_Asked]:
    """Distinct questions, those about one picture in a row, in the order of first mention."""
    by_picture: dict[str | None, dict[str, list[Sample]]] = {}
    for sample in samples:
        by_picture.setdefault(sample.image, {}).setdefault(sample.prompt, []).append(sample)
    return [
        _Asked(image, prompt, tuple(found))
        for image, prompts in by_picture.items()
        for prompt, found in prompts.items()
    ]


class _Folder:
    """The run's folder while it is written; holds the lock of every arm's answers."""

    def __init__(
        self,
        out: Path,
        task: Task,
        workload: Workload,
        settings: Settings,
        arms: Mapping[str, Decoder],
        command: str,
        *,
        retry_failed: bool,
    ) -> None:
        self._out = out
        self._retry_failed = retry_failed
        self._questions = _questions(workload.samples)
        self._saved = 0.0
        self._left_open: list[tuple[str, PassingError]] = []
        self.asked = self.answered = 0
        """Samples that this start has written, and those of them that have an answer."""
        ids = {sample.id for sample in workload.samples}
        _refuse_shared_folders(arms)
        make_folder(out)
        with ExitStack() as opened:
            # the lock comes first: nothing in the folder is read or written by two processes
            self._files = {arm: opened.enter_context(JsonLines(self._arm(arm), LINE)) for arm in arms}
            self._claim(task, workload, settings, arms, command)
            self._done = {
                arm: {line["id"] for line in checked(file.path, file, ids) if self._stays(line)}
                for arm, file in self._files.items()
            }
            for file in self._files.values():
                file.claim()
            remove_drafts(out, CARD, SAMPLES)
            self._open = opened.pop_all()

    def _stays(self, line: Mapping[str, Any]) -> bool:
        return not (self._retry_failed and "failed" in line)

    def _arm(self, arm: str) -> Path:
        folder = self._out / arm_folder(arm)
        if folder.is_symlink():
            raise DataError(f"{folder} is a link, and nothing is written through links", "choose another --out")
        make_folder(folder)
        return folder / ANSWERS

    def _claim(
        self,
        task: Task,
        workload: Workload,
        settings: Settings,
        arms: Mapping[str, Decoder],
        command: str,
    ) -> None:
        """Finds that the folder is this run's, or nobody's; it is made this run's own when a model begins to answer."""
        known = {
            "format": FORMAT,
            "task": task.name,
            "options": task.options(),
            "data": dict(workload.about),
            "samples": digest(workload.samples),
            "count": len(workload.samples),
            "images": None if workload.images is None else str(workload.images.resolve()),
            "model": settings.model,
            "revision": settings.revision,
            "max_pixels": settings.max_pixels,
            "device_map": settings.device_map,
            "quantize": settings.quantize,
            "decoding": decoding(settings),
        }
        named = {name: _about(decoder) for name, decoder in arms.items()}
        path = self._out / CARD
        if path.exists():
            self._card = read_json(path, SCORABLE)
            if wrong := fault(self._card, fields({"sessions": list_of(SESSION)})):
                raise DataError(f"{path}{wrong}", "restore the file, or choose another --out")
            moved = self._moved(known)
            data = {name: without_names(known[name]) for name in ("options", "data")}
            refuse_other(
                self._out, path, self._card, {name: v for name, v in known.items() if name not in (*data, *moved)}
            )
            refuse_other(self._out, path, {name: without_names(self._card[name]) for name in data}, data)
            self._card |= moved | {"options": known["options"]}
            former = self._card["arms"]
            both = {name: about for name, about in named.items() if name in former}
            before = {name: {key: former[name].get(key) for key in about} for name, about in both.items()}
            refuse_other(self._out, path, before, both)
            self._refuse_strange_answers(named.keys() - former.keys())
            former |= {name: about for name, about in named.items() if name not in former}
        else:
            self._refuse_strange_answers(arms)
            if strange := [name for name in (SAMPLES, RESULTS, REPORT, *COMPARISON) if (self._out / name).exists()]:
                raise UsageError(f"{self._out} holds {', '.join(strange)} but no {CARD}", "choose another --out")
            self._card = known | {"arms": named, "command": command, "sessions": []}
        self._samples = workload.samples

    def _refuse_strange_answers(self, arms: Iterable[str]) -> None:
        """Refuses answers of arms that no card knows."""
        if strange := [self._files[arm].path for arm in arms if not self._files[arm].is_empty]:
            raise UsageError(f"{strange[0]} holds answers but no {CARD} says which", "choose another --out")

    def _moved(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """What says where something is, and may be another place: digests say whether it is the same."""
        moved = {"images": known["images"]}
        model, card = known["model"], self._card
        if model != card["model"] and card.get("commit") is None and EMBEDDED.get(model, Path(model)).is_dir():
            if weights_digest(model, None) == card.get("weights"):
                moved["model"] = model
        return moved

    @property
    def batch_size(self) -> int:
        """Rows per batch, the same from start to start."""
        return int(self._card["batch_size"])

    def left(self, arm: str) -> int:
        """Samples of an arm without a record."""
        return sum(len(asked.samples) for asked in self._questions) - len(self._done[arm])

    def pictures(self) -> dict[str, str]:
        """Digests of the pictures that the folder has answers about, of whatever arm."""
        lines = (line for arm in self._card["arms"] for line in read_lines(self._out / arm_folder(arm) / ANSWERS))
        return {line["image"]: line["sha256"] for line in lines if "answer" in line and "sha256" in line}

    def begin(
        self, vlm: VLM, settings: Settings, arms: Mapping[str, Decoder], batch_size: int | None, workload: Workload
    ) -> None:
        """Notes that a model starts to work on the folder."""
        rows = batch_size or self._card.get("batch_size")
        if not rows:
            names = dict.fromkeys(asked.image for asked in self._questions if asked.image is not None)
            paths = [_path(workload, name) for name in names]
            sample = typical(paths, (asked.prompt for asked in self._questions))
            rows = min(fitting_batch(vlm, decoder, settings, sample) for decoder in arms.values())
        found = {
            "weights": weights_digest(settings.model, vlm.revision),
            "files": model_files(settings.model, vlm.revision),
            "checkpoint": vlm.reading,
            "commit": vlm.revision,
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "batch_size": rows,
        }
        if self._card["sessions"]:
            refuse_older_card(self._out, self._card)
        before = {name: self._card[name] for name in found if name in self._card}
        refuse_other(self._out, self._out / CARD, before, {name: found[name] for name in before})
        self._card |= found
        self._note_facts({name: decoder.facts(vlm) for name, decoder in arms.items()})
        self._card.setdefault("sessions", []).append(
            {"started": _now(), "device": device_name(vlm.device), "versions": versions()}
        )
        self._device = vlm.device
        if self._retry_failed:
            for file in self._files.values():
                file.keep(self._stays)
        self.save()  # first: samples without a card would be taken for somebody else's
        write_samples(self._out, self._samples)

    def _note_facts(self, facts: Mapping[str, dict[str, str]]) -> None:
        """Keeps the facts of arms that begin and compares those of arms that go on; a card of old may have none."""
        arms = self._card["arms"]
        known = {name: {"facts": arms[name]["facts"]} for name in facts if self._done[name] and "facts" in arms[name]}
        refuse_other(self._out, self._out / CARD, known, {name: {"facts": facts[name]} for name in known})
        for name, own in facts.items():
            if not self._done[name]:
                arms[name]["facts"] = own

    def work(self, arm: str, answerer: Answerer, workload: Workload, vlm: VLM) -> Iterator[None]:
        """Answers what is left of an arm; yields once for each sample that is written."""
        done, size = self._done[arm], self.batch_size
        batches = [self._questions[start : start + size] for start in range(0, len(self._questions), size)]
        open_batches = [b for b in batches if any(s.id not in done for asked in b for s in asked.samples)]
        names = dict.fromkeys(a.image for batch in open_batches for a in batch if a.image is not None)
        found = (Found(name, _path(workload, name)) for name in names)
        started, tokens = time.perf_counter(), 0
        with (
            closing(read_ahead(found, batch=size)) as pictures,
            closing(
                answerer(_shown(open_batches, pictures), lambda: self._answered_question(arm, workload))
            ) as answers,
        ):
            for settled in answers:
                for asked, outcome in settled:
                    if isinstance(outcome, PassingError):
                        self._left_open += [(sample.id, outcome) for sample in asked.samples if sample.id not in done]
                        continue
                    for sample in asked.samples:
                        line = _line(sample, asked.sha256, outcome)
                        if sample.id not in done:
                            self._files[arm].append(line)
                            done.add(sample.id)
                            self.asked += 1
                            self.answered += "failed" not in line
                            yield
                        tokens += len(line.get("ids", ()))
                self._note(arm, tokens, time.perf_counter() - started)

    def _answered_question(self, arm: str, workload: Workload) -> Question | None:
        """A question that this arm has an answer to."""
        answered = {line["id"] for line in self._files[arm] if "failed" not in line}
        for asked in self._questions:
            if any(sample.id in answered for sample in asked.samples):
                try:
                    image = None if asked.image is None else open_picture(_path(workload, asked.image)).image
                except (DataError, PassingError):  # broken since it was answered, or not to be had now
                    continue
                return Question(image, asked.prompt)
        return None

    def refuse_open(self) -> None:
        """Raises when trouble of the machine has left samples open."""
        if self._left_open:
            name, trouble = self._left_open[0]
            raise PassingError(
                f"{len(self._left_open)} samples are left open, the first {name}: {trouble.message}",
                f"the same command asks them again; {trouble.hint}",
            )

    def _note(self, arm: str, tokens: int, seconds: float) -> None:
        timing = {"tokens": tokens, "seconds": round(seconds, 3)}
        self._card["sessions"][-1].setdefault("arms", {})[arm] = timing
        if time.monotonic() - self._saved > CARD_SECONDS:
            self.save()

    def save(self) -> None:
        """Rewrites the card."""
        self._card["sessions"][-1] |= {"updated": _now(), "peak_memory": peak_memory(self._device)}
        replace_json(self._out / CARD, self._card)
        self._saved = time.monotonic()

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _shown(
    batches: Iterable[Sequence[_Asked]], pictures: Iterator[tuple[Found, Picture | DataError | PassingError]]
) -> Iterator[list[tuple[_Asked, Question | str | PassingError]]]:
    """Batches with the pictures that they ask about, which come in the order of first mention."""
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
    return about | {"answer": outcome.text, "ids": list(outcome.ids), "finish": outcome.finish}


def decoding(settings: Settings) -> dict[str, Any]:
    """The generation settings that two comparable runs share."""
    return {
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }


def _about(decoder: Decoder) -> dict[str, Any]:
    about = {
        "spec": decoder.spec(),
        "parameters": {name: plain(value) for name, value in decoder.parameters().items()},
    }
    return about | ({"strategy": str(decoder.strategy)} if decoder.strategy else {})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
