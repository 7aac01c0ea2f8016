"""Keeps the file of a worker that shares a run, by which the others know what it answers with and that it lives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from vlmfix.card import Known, versions
from vlmfix.errors import DataError, UsageError
from vlmfix.jobs import blocks as shared
from vlmfix.jobs.blocks import BlockFolder, named_worker
from vlmfix.jobs.folder.output import Totals, measured
from vlmfix.jobs.ledger import CARD_SECONDS, facts_of, now
from vlmfix.jobs.lines import MARKS
from vlmfix.records import refuse_other
from vlmfix.settings import Settings

FIRST_SECONDS = 3600.0
"""Time that a worker may take to load its model and answer its first batch, and a planner to find a further picture."""
STILL_SECONDS, SLOWER = 600.0, 10
"""Time that each further batch may take; or so many times as long as the slowest one so far, if that is more."""


class Worker:
    """Keeps the file of a worker, which says what it answers with, how far it is, and again and again that it lives.

    A thread of its own writes the file, which would go on while another one hangs, on a GPU or on a disk that is away.
    So it gives a sign of life only while the worker gets on (``moved``); without one, its blocks are soon another's.
    That a worker that gets on again has lost them does no harm, since of a block one attempt counts, whole.
    """

    def __init__(self, folder: BlockFolder, settings: dict[str, Any]) -> None:
        self.name = named_worker()
        self._folder = folder
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._marked = 0.0
        self._asked = settings
        self._moved = self._planned = time.monotonic()
        self._slowest: float | None = None
        """Seconds of the slowest batch but the first; None before the first one is answered."""
        self._planning = False
        self.totals = Totals()
        self._peak_memory: Callable[[], int] = lambda: 0
        self.card: dict[str, Any] = {
            "worker": self.name,
            "beat": 0,
            "ended": False,
            "hung": False,
            "planning": False,
            "settings": settings,
            "started": now(),
            "updated": now(),
            "sessions": [],
            "totals": self.totals.noted(),
            "recent": [],
        }

    def __enter__(self) -> Self:
        self._save_alike()
        self._thread = threading.Thread(target=self._beat, name="vlmfix-beat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self.card["ended"] = True
        with suppress(DataError):  # then its lease runs out
            self.save()

    def _beat(self) -> None:
        while not self._ending.wait(shared.LEASE_SECONDS / shared.BEATS):
            with suppress(DataError):  # the disk may be full, and the next one may be written
                self.save()

    def moved(self, *, batch: bool = False) -> None:
        """Says that the worker gets on.

        Args:
            batch: Whether it has answered a batch.
        """
        moved = time.monotonic()
        if batch and self._slowest is None:
            self._slowest = 0.0
        elif batch and self._slowest is not None:
            took = moved - self._moved
            # it hung, or batches take longer here: it gets twice the time, and not ten times what a hang took
            took = took if took <= self._patience else 2 * self._patience / SLOWER
            self._slowest = max(self._slowest, took)
        self._moved = moved

    @property
    def _patience(self) -> float:
        return FIRST_SECONDS if self._slowest is None else max(STILL_SECONDS, SLOWER * self._slowest)

    def save(self) -> None:
        """Writes the file, with another sign of life unless the worker hangs."""
        with self._lock:
            self.card["hung"] = not self.card["ended"] and time.monotonic() - self._moved > self._patience
            self.card["beat"] += not self.card["hung"]
            self.card["planning"] = self._planning and time.monotonic() - self._planned <= FIRST_SECONDS
            self.card["updated"] = now()
            self.card["totals"] = self.totals.noted()
            if self.card["sessions"]:
                self.card["sessions"][-1]["peak_memory"] = self._peak_memory()
                if time.monotonic() - self._marked > CARD_SECONDS or self.card["ended"]:
                    done = self.totals.answers + self.totals.failed
                    self.card["recent"] = [*self.card["recent"], {"time": now(), "done": done}][-MARKS:]
                    self._marked = time.monotonic()
            self._folder.write_card(self.name, self.card)

    def _save_alike(self) -> None:
        """Writes the file, and then compares it with those of others, so that of two at least one sees the other.

        Raises:
            UsageError: Another worker answers with other settings.
        """
        self.save()
        mine = self.card["settings"]
        try:
            for name, card in self._folder.cards().items():
                before = card["settings"]
                both_begun = card["sessions"] and self.card["sessions"]
                names = mine if both_begun else [known for known in mine if known in before]
                path = self._folder.workers / f"{name}.json"
                refuse_other(self._folder.out, path, before, {known: mine[known] for known in names})
        except UsageError:
            self.card |= {"sessions": [], "settings": self._asked}  # it has answered nothing
            (self._folder.workers / f"{self.name}.json").unlink(missing_ok=True)
            raise

    def begin(
        self, model: Known, settings: Settings, *, batch_size: int, prompts_file: str | None, peak: Callable[[], int]
    ) -> None:
        """Notes that a model starts to work; see ``Ledger.start_session``.

        Raises:
            UsageError: Another worker answers with other weights, files or facts.
        """
        with self._lock:
            self._peak_memory = peak
            self.card["settings"] = {
                **self.card["settings"],
                **facts_of(model, settings),
                "decoder_facts": dict(model.facts),
            }
            session = {"started": now(), "device": model.device, "batch_size": batch_size, "peak_memory": 0}
            self.card["sessions"] = [
                {**session, "prompts_file": prompts_file, "versions": versions(), **measured(settings)}
            ]
        self._save_alike()

    @property
    def is_planning(self) -> bool:
        """Returns whether it has noted that it plans."""
        return self._planning

    def plans(self, planning: bool) -> None:
        """Notes whether it plans."""
        self._planning = planning
        self.planned()
        self.save()

    def planned(self) -> None:
        """Says that the planner gets on."""
        self._planned = time.monotonic()
