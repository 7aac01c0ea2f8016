"""The folder that an evaluation writes: card, samples, and each arm's raw answers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from functools import cache
from pathlib import Path, PurePath
from typing import Any, get_type_hints

from vlmfix.errors import DataError, PluginError, UsageError, VlmfixError
from vlmfix.evals.task import Judged, Sample, Task
from vlmfix.evals.tasks import TASKS
from vlmfix.files import plain_name, replacing
from vlmfix.parsing import some
from vlmfix.plugins import refuse_other_plugins
from vlmfix.records import read_json, read_lines, shown, to_json
from vlmfix.settings import DECODED, LOADED, MODEL, REQUESTED
from vlmfix.shapes import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    PATH,
    SIZE,
    TEXT,
    Shape,
    fault,
    fields,
    list_of,
    mapping_of,
)
from vlmfix.skips import Skips

FORMAT = 1
"""Of the folder; raised when an older reader could not understand it."""
CARD, SAMPLES, ANSWERS = "card.json", "samples.jsonl", "answers.jsonl"
RESULTS, REPORT = "results.json", "report.json"
COMPARISON = ("comparison.csv", "comparison.md", "comparison.png")
"""What a comparison leaves: table, text and plot."""
PLUGINS = mapping_of(TEXT).or_null()
"""What a card says of what is not vlmfix's own: name -> distribution and version, or digest of a file."""
ARM = fields(
    {"spec": TEXT, "parameters": OBJECT},
    {"strategy": TEXT, "facts": mapping_of(TEXT), "plugins": PLUGINS, "skipped": COUNT, "skip_rate": NUMBER},
)
SESSION = fields(
    {"versions": mapping_of(TEXT.or_null())}, {"arms": OBJECT, "started": TEXT, "updated": TEXT, "device": TEXT}
)
READING = fields({"ends": list_of(COUNT), "set_aside": OBJECT, "completed": OBJECT}).or_null()
"""What a card says of how the checkpoint's settings were read."""
MADE_BY = {
    "images": PATH.or_null(),
    "checkpoint": READING,
    **MODEL,
    "batch_size": SIZE,
}
"""What a card says of the model and the pictures that made its answers."""
SCORED = {
    "format": COUNT,
    "task": TEXT,
    "options": OBJECT,
    "samples": TEXT,
    "arms": mapping_of(ARM),
    "data": OBJECT,
    "count": COUNT,
    "model": TEXT,
    "decoding": fields(DECODED, REQUESTED),
}
BESIDES = MADE_BY | LOADED | {"sessions": list_of(SESSION), "plugins": PLUGINS}
SCORABLE = fields(SCORED, BESIDES)
"""What a card must say for its answers to be scored, and what it may say besides."""
RESUMABLE = fields(SCORED | {"sessions": list_of(SESSION)}, BESIDES)
"""The same for the run to be gone on with."""
SAMPLE = fields({"id": TEXT, "image": TEXT.or_null(), "prompt": TEXT, "target": OBJECT, "group": TEXT, "unit": TEXT})
LINE = fields(
    {"id": TEXT},
    {
        "answer": TEXT.or_null(),
        "ids": list_of(COUNT),
        "finish": TEXT,
        "skipped": COUNT,
        "failed": TEXT,
        "sha256": TEXT,
    },
)
"""One line of an arm's answers."""
OPTIONS: Mapping[Any, Shape] = {
    str: TEXT,
    str | None: TEXT.or_null(),
    bool: FLAG,
    int: COUNT,
    float: NUMBER,
    Sequence[str]: list_of(TEXT),
    Mapping[str, Sequence[str]]: mapping_of(list_of(TEXT)),
}
"""What an option of a benchmark may be, by the type of its field."""
NAMES = ("file", "generation")
"""Keys of a card that call a file something; a digest beside them says which it is."""
PLAIN = "greedy"
"""Name of the plain arm, which every run has."""


@dataclass(frozen=True)
class Record:
    """One line of an arm's answers.

    Attributes:
        id: The sample's.
        answer: What the model said, raw; None when it failed.
        ids: Generated token ids, the end token included.
        finish: ``eos``, ``stop``, ``length`` or ``context``; empty when it failed.
        failed: Why there is no answer; empty when there is one.
        sha256: Hex digest of the picture's file; empty when there is none.
        skipped: How many of the tokens a decoder with ``when=uncertain`` left to the clean row; None for others.
    """

    id: str
    answer: str | None
    ids: tuple[int, ...] = ()
    finish: str = ""
    failed: str = ""
    sha256: str = ""
    skipped: int | None = None


def skips_of(records: Iterable[Record]) -> Skips:
    """Counts the tokens that a contrast left to the clean row in some answers."""
    found = Skips()
    for one in records:
        found.count(one.skipped, len(one.ids))
    return found


@dataclass(frozen=True, eq=False)
class EvalRun:
    """A run as it lies on the disk.

    Attributes:
        folder: Where.
        card: What was run: data, model, decoding, arms, sessions.
        task: The rules of scoring that the run was made with.
        samples: What was asked, in order.
        answers: For each arm the records by sample id; an unfinished arm lacks some.
        asked_now: Samples that the start which gave this run has written, over all arms; 0 for one that was only read.
        answered_now: Those of them that have an answer.
    """

    folder: Path
    card: dict[str, Any]
    task: Task
    samples: list[Sample]
    answers: dict[str, dict[str, Record]]
    asked_now: int = 0
    answered_now: int = 0

    @property
    def in_vain(self) -> bool:
        """Whether every sample of the start failed, or all of some arm."""
        empty = any(found and all(record.failed for record in found.values()) for found in self.answers.values())
        return empty or (self.asked_now > 0 and self.answered_now == 0)

    def judged(self, arm: str) -> list[Judged]:
        """Samples of an arm that have an answer, with their verdicts, in order."""
        answered = self.answered(arm)
        verdicts = self.task.judge_all(answered, self.texts(arm))
        return list(zip(answered, verdicts, strict=True))

    def answered(self, arm: str) -> list[Sample]:
        """Samples of an arm that have an answer, in order."""
        found = self.answers[arm]
        return [sample for sample in self.samples if sample.id in found and not found[sample.id].failed]

    def texts(self, arm: str) -> list[str]:
        """Their raw answers, in the same order."""
        found = self.answers[arm]
        return [found[sample.id].answer or "" for sample in self.answered(arm)]

    def pictures(self) -> dict[str, str]:
        """Digests of the pictures that some arm has an answer about, by their names.

        Raises:
            UsageError: A picture had several contents, in several arms or in one.
        """
        found: dict[str, dict[str, None]] = {}
        for sample in self.samples:
            for arm in self.answers:
                record = self.answers[arm].get(sample.id)
                if sample.image is not None and record is not None and record.sha256 and not record.failed:
                    found.setdefault(sample.image, {})[record.sha256] = None
        if several := [name for name, digests in found.items() if len(digests) > 1]:
            raise UsageError(
                f"the answers in {self.folder} are about several contents of {len(several)} of {len(found)} pictures: "
                f"{some(several)}",
                "answers about other pictures cannot be compared; run it again with another --out",
            )
        return {name: next(iter(digests)) for name, digests in found.items()}

    def failed(self, arm: str) -> int:
        """Samples of an arm that failed."""
        return sum(bool(record.failed) for record in self.answers[arm].values())

    def skips(self, arm: str) -> Skips:
        """Tokens of an arm's answers that a contrast left to the clean row."""
        return skips_of(self.answers[arm].values())

    def missing(self, arm: str) -> int:
        """Samples of an arm that were not asked yet."""
        return len(self.samples) - len(self.answers[arm])


def read_run(folder: Path) -> EvalRun:
    """Read a run.

    Raises:
        DataError: The folder is not a run's, a file in it was changed, or its benchmark is not known here.
        PluginError: The benchmark is another distribution's or in a file, and is not that of the run.
    """
    if not os.path.exists(folder / CARD):
        raise DataError(f"{folder} holds no {CARD}", "give a folder that vlmfix eval wrote")
    card = read_json(folder / CARD, SCORABLE)
    if card["format"] != FORMAT:
        raise DataError(f"{folder / CARD} has format {card['format']!r}", f"this version reads format {FORMAT}")
    task = _task(folder / CARD, card)
    refuse_other_plugins(str(folder), card.get("plugins"), task.plugins())
    samples = [_sample(folder, line) for line in read_lines(folder / SAMPLES, SAMPLE)]
    if digest(samples) != card["samples"]:
        raise DataError(f"{folder / SAMPLES} is not what the run asked", "restore the file, or run again")
    ids = {sample.id for sample in samples}
    arms: dict[str, dict[str, Record]] = {}
    for name in card["arms"]:
        path = folder / arm_folder(name) / ANSWERS
        arms[name] = {line["id"]: record(line) for line in checked(path, read_lines(path, LINE), ids)}
    return EvalRun(folder, card, task, samples, arms)


def _sample(folder: Path, line: Mapping[str, Any]) -> Sample:
    try:
        return Sample(**line)
    except TypeError as error:
        raise DataError(
            f"a line of {folder / SAMPLES} is no sample: {error}", "restore the file, or run again"
        ) from error


def _task(path: Path, card: Mapping[str, Any]) -> Task:
    """The rules of scoring that a card says."""
    try:
        kind: type[Task] = TASKS.find(card["task"])
    except UsageError as error:
        made_by = (card.get("plugins") or {}).get(card["task"])
        hint = f"install {made_by}, or put the file back" if made_by else error.hint
        raise DataError(f"{path}: {error.message}", hint) from error
    options, hints = card["options"], get_type_hints(kind)
    if strange := sorted(field.name for field in fields_of(kind) if hints[field.name] not in OPTIONS):
        raise PluginError(
            f"{kind.called()}: {', '.join(strange)} has a type that a card cannot hold",
            "options of a benchmark are str, bool, int or float",
        )
    known = {field.name: OPTIONS[hints[field.name]] for field in fields_of(kind)}
    wrong = fault(options, fields({}, known))
    if strange := sorted(options.keys() - known.keys()):
        wrong = f" has {', '.join(strange)}, which {kind.name} does not know"
    if wrong:
        raise DataError(f"the options in {path}{wrong}", "restore the file, or run again")
    try:
        return kind(**options)
    except VlmfixError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from error


def checked(path: Path, lines: Iterable[dict[str, Any]], ids: set[str]) -> Iterator[dict[str, Any]]:
    """The lines of an arm's answers, as long as they are answers to a run's samples.

    Raises:
        DataError: A line is about no sample, or holds neither an answer nor a failure.
    """
    hint = "restore the file, remove that line, or run again"
    for number, line in enumerate(lines, start=1):
        if line["id"] not in ids:
            raise DataError(f"line {number} of {path} has the id {shown(line['id'])}, which no sample has", hint)
        if line.get("answer") is None and not line.get("failed"):
            raise DataError(f"line {number} of {path} has neither answer nor failed", hint)
        yield line


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write what was asked; a reader sees the old file or the new one, never a part.

    Raises:
        DataError: The file cannot be written.
    """
    with replacing(folder / SAMPLES) as file:
        file.writelines(f"{to_json(asdict(sample))}\n".encode() for sample in samples)


def record(line: dict[str, Any]) -> Record:
    """One line of an answers file."""
    return Record(
        id=line["id"],
        answer=line.get("answer"),
        ids=tuple(line.get("ids", ())),
        finish=line.get("finish", ""),
        failed=line.get("failed", ""),
        sha256=line.get("sha256", ""),
        skipped=line.get("skipped"),
    )


def without_names(value: Any) -> Any:  # noqa: ANN401 (any JSON value)
    """What a card says without absolute paths, file names and what a version calls a published file.

    A moved or renamed file is the same data, and so is one that only a newer version knows: digests stand beside them.
    """
    if isinstance(value, Mapping):
        return {key: without_names(inner) for key, inner in value.items() if key not in NAMES and not _is_path(inner)}
    return value


def _is_path(value: object) -> bool:
    return isinstance(value, str) and PurePath(value).is_absolute()


@cache
def arm_folder(name: str) -> str:
    """Folder of an arm: its name, as far as a file can have it; see ``plain_name``."""
    return plain_name(name)


def digest(samples: Sequence[Sample]) -> str:
    """Which samples these are: sha256 of their lines."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(to_json(asdict(sample)).encode() + b"\n")
    return f"sha256:{whole.hexdigest()}"
