"""Writes the folder that the parts of a run are joined into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import UsageError
from vlmfix.jobs.folder.output import Totals
from vlmfix.jobs.ledger import CardFolder
from vlmfix.jobs.lines import ANSWER, ANSWERS, CARD, FAILED, FAILURE
from vlmfix.shapes import OBJECT, SIZE, fields


@dataclass(frozen=True)
class Merged:
    """Says what was joined.

    Attributes:
        into: The folder.
        shards: Number of shards, or of workers that answered.
        totals: Totals of all of them.
        unlisted: Why the pictures could not be listed, so that what is missing is known from the cards alone; empty
            when they were listed.
        parts: What was joined, in a word.
    """

    into: Path
    shards: int
    totals: Totals
    unlisted: str
    parts: str = "shards"


class MergedFolder(CardFolder):
    """Writes the folder that shards are joined into."""

    card_name: ClassVar = CARD
    card_shape: ClassVar = fields({"settings": OBJECT}, {"merged": SIZE})
    option: ClassVar = "--into"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, {ANSWERS: ANSWER, FAILED: FAILURE})
        self._settings = dict(settings)

    def new_card(self) -> dict[str, Any]:
        """Makes an empty card: what it says comes with the shards."""
        return {}

    def go_on(self) -> None:
        """Refuses a folder that a run has written, and shards of another run."""
        if "merged" not in self.card:
            raise UsageError(f"{self.folder} holds answers that a run wrote itself", "choose another --into")
        self.refuse_other(self.card["settings"], self._settings)

    def read_back(self) -> None:
        """Reads nothing: all lines are written anew."""
