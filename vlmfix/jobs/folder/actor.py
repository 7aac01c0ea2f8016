"""Answers blocks of questions on a Ray cluster, in a process that Ray makes and that has a model of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.answering import Answerer, Outcome
from vlmfix.card import versions
from vlmfix.decoders import parse
from vlmfix.errors import PassingError
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM
from vlmfix.images import Found, read_ahead
from vlmfix.jobs.blocks import named_worker, taken
from vlmfix.jobs.folder.batches import Sample, batches
from vlmfix.jobs.folder.job import Named, record_of
from vlmfix.jobs.folder.output import measured
from vlmfix.jobs.folder.ray_folder import RayFolder, identity, refuse_other_settings, table_of
from vlmfix.jobs.folder.suspects import chunks, stretches
from vlmfix.jobs.journal import DIED, Journal
from vlmfix.jobs.ledger import asked_before, facts_of, now
from vlmfix.records import replace_json
from vlmfix.settings import Settings
from vlmfix.supply import Question

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Task:
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

    def __init__(self, task: Task) -> None:
        settings, decoder = task.settings, parse(task.settings.decoder)
        self._base, self._named = task.base, task.named
        sample = [taken(json.loads(line), 0, task.base) for line in task.sample]
        self._sample: list[tuple[Found, str]] = [(file, file.prompts[0]) for file in sample]
        self._folder, self._name, self._blocks = RayFolder(task.out), named_worker(), 0
        vlm = task.loader(settings.model, **settings.loading())
        rows = task.batch_size
        if rows is None:
            longest = max((prompt for _, prompt in self._sample), key=len, default="")
            with self._journal(sample) as journal:
                fine = [file for file in sample if _deaths(journal, file) is None]
                journal.begin([key for file in fine for key in _ids(file)])
                rows = fitting_batch(vlm, decoder, settings, typical(fine, [longest]))
        self._answerer = Answerer(vlm, decoder, settings, rows)
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
        self._write_card()
        refuse_other_settings(task.out, self._folder.cards())

    def _write_card(self) -> None:
        self._card["session"]["peak_memory"] = self._answerer.peak_memory
        card = self._card | {"totals": self._totals, "updated": now()}
        replace_json(self._folder.workers / f"{self._name}.json", card)

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
        with self._journal(files) as journal:
            still_open = []
            for file in files:
                if any(map(journal.is_given_up, _ids(file))):
                    failures = ({"image": file.name, "reason": DIED, "prompt": prompt} for prompt in file.prompts)
                    settled.extend(zip(_ids(file), failures, strict=True))
                else:
                    still_open.append(file)
            # the doubtful ones come last, so that an actor that dies again has tried the others
            still_open.sort(key=lambda file: any(map(journal.is_doubtful, _ids(file))))
            for stretch in stretches(
                chunks(still_open, self._answerer.ahead),
                most=self._answerer.rows,
                deaths=lambda file: _deaths(journal, file),
                begin=lambda files, apart: journal.begin([key for file in files for key in _ids(file)], apart=apart),
            ):
                for part in self._answers(stretch):
                    settled += [(key, line) for key, line in part if line is not None]
                    journal.leave(key for key, _ in part)
        for _, line in settled:
            self._totals["failed" if "reason" in line else "answers"] += 1
        self._write_card()
        ids = set(block.column("id").to_pylist())
        for path, told in self._folder.journals(ids):  # of actors that died with this block
            if all(ids.issuperset(names) for line in told for names in line.values()):
                path.unlink(missing_ok=True)
        return table_of(settled)

    def _answers(self, files: Iterable[Found]) -> Iterator[list[tuple[str, dict[str, Any] | None]]]:
        """Yields ids and lines of questions as they are settled; None for a line where trouble leaves one open."""
        unopened: list[tuple[str, dict[str, Any] | None]] = []

        def fail(file: Found, reason: str) -> None:
            unopened.extend((key, {"image": file.name, "reason": reason}) for key in _ids(file))

        with (
            closing(read_ahead(files, batch=self._answerer.ahead)) as pictures,
            closing(self._answerer(batches(pictures, self._answerer, fail), self._asked_before)) as answers,
        ):
            for part in answers:
                yield [(identity(sample.image, sample.prompt), self._line(sample, outcome)) for sample, outcome in part]
        yield unopened

    def _line(self, sample: Sample, outcome: Outcome) -> dict[str, Any] | None:
        if isinstance(outcome, PassingError):
            return None
        if isinstance(outcome, str):
            return {"image": sample.image, "reason": outcome, "prompt": sample.prompt}
        self._sample = [(sample.file, sample.prompt)]
        return record_of(sample, outcome, self._named)

    @contextmanager
    def _journal(self, files: Iterable[Found]) -> Iterator[Journal]:
        """Keeps a journal of its own inside the block, and knows those of actors that died with the same questions."""
        earlier = self._folder.journals({key for file in files for key in _ids(file)})
        path = self._folder.begun / f"{self._name}-{self._blocks}.jsonl"
        self._blocks += 1
        journal = Journal(path, [line for _, lines in earlier for line in lines])
        try:
            yield journal
        finally:
            journal.close()

    def _asked_before(self) -> Question | None:
        return asked_before(self._sample)


def _ids(file: Found) -> list[str]:
    """Returns the ids of the questions about a picture."""
    return [identity(file.name, prompt) for prompt in file.prompts]


def _deaths(journal: Journal, file: Found) -> int | None:
    return max((count for key in _ids(file) if (count := journal.deaths(key)) is not None), default=None)
