"""Answers blocks of questions on a Ray cluster, in a process that Ray makes and that has a model of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.answering import Answerer
from vlmfix.card import versions
from vlmfix.decoders import parse
from vlmfix.errors import PassingError
from vlmfix.fitting import fitting_batch, typical
from vlmfix.generation import VLM
from vlmfix.images import Found, read_ahead
from vlmfix.jobs.blocks import named_worker, taken
from vlmfix.jobs.folder.batches import batches
from vlmfix.jobs.folder.job import Named, record_of
from vlmfix.jobs.folder.output import measured
from vlmfix.jobs.folder.ray_folder import RayFolder, identity, refuse_other_settings, table_of
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
        vlm = task.loader(settings.model, **settings.loading())
        rows = task.batch_size
        if rows is None:
            longest = max((prompt for _, prompt in self._sample), key=len, default="")
            rows = fitting_batch(vlm, decoder, settings, typical(sample, [longest]))
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
        folder = RayFolder(task.out)
        self._place = folder.workers / f"{named_worker()}.json"
        self._write_card()
        refuse_other_settings(task.out, folder.cards())

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

        def unopened(file: Found, reason: str) -> None:
            settled.extend(
                (identity(file.name, prompt), {"image": file.name, "reason": reason}) for prompt in file.prompts
            )

        with (
            closing(read_ahead(files, batch=self._answerer.ahead)) as pictures,
            closing(self._answerer(batches(pictures, self._answerer, unopened), self._asked_before)) as answers,
        ):
            for part in answers:
                for sample, outcome in part:
                    if isinstance(outcome, PassingError):
                        continue
                    if isinstance(outcome, str):
                        line = {"image": sample.image, "reason": outcome, "prompt": sample.prompt}
                    else:
                        line = record_of(sample, outcome, self._named)
                        self._sample = [(sample.file, sample.prompt)]
                    settled.append((identity(sample.image, sample.prompt), line))
        for _, line in settled:
            self._totals["failed" if "reason" in line else "answers"] += 1
        self._write_card()
        return table_of(settled)

    def _asked_before(self) -> Question | None:
        return asked_before(self._sample)
