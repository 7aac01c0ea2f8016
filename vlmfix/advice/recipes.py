"""Reads what the recipes that come with the package were measured to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmfix.language.recipe import SHIPPED, read_recipe

ORDER = ("keep-recall", "fewest-inventions", "fast")
"""In which recipes are shown: the one to begin with comes first."""
KEPT = 0.02
"""A recipe keeps recall on a model when the measured fall is no larger."""


@dataclass(frozen=True)
class Figure:
    """Holds one figure of captions and its difference to plain decoding.

    Attributes:
        plain: The figure of plain decoding.
        change: The difference to it.
        low: Lower end of the difference's 95 % interval.
        high: Its upper end.
        clear: Whether the comparison calls it better or worse: by a test corrected for all figures and arms.
    """

    plain: float
    change: float
    low: float
    high: float
    clear: bool

    def text(self) -> str:
        """Writes the difference with its interval."""
        return f"{self.change:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Measured:
    """Holds what a recipe did to one model.

    Attributes:
        figures: ``chair_i`` (share of mentioned objects that are not there), ``recall`` (share of the objects in the
            pictures that are mentioned), ``f1`` (both weighed alike) and ``chair_s`` (share of the answers that mention
            something absent).
    """

    figures: Mapping[str, Figure]

    @property
    def keeps_recall(self) -> bool:
        """Returns whether recall falls by no more than ``KEPT``."""
        return self.figures["recall"].change >= -KEPT

    @property
    def helps(self) -> bool:
        """Returns whether clearly fewer of the mentioned objects are absent."""
        invented = self.figures["chair_i"]
        return invented.clear and invented.change < 0


@dataclass(frozen=True)
class Recipe:
    """Holds one recipe.

    Attributes:
        name: What it is called behind ``@``.
        decoder: The specification.
        summary: What it does, in a sentence.
        rows: Rows that the model computes for a question: beams times branches.
        chosen: How its parameters were chosen.
        run: How it was measured: task, scenes, seed, commands, machine, versions, revision.
        time: A step's time against plain greedy's: ``alone``, ``many`` with so many ``together``; with command, machine
            and revision.
        models: What it did to each model, by the model's name.
    """

    name: str
    decoder: str
    summary: str
    rows: int
    chosen: str
    run: Mapping[str, Any]
    time: Mapping[str, Any]
    models: Mapping[str, Measured]

    @property
    def methods(self) -> tuple[str, ...]:
        """Returns the names of the decoders in it."""
        return tuple(part.partition(":")[0] for part in self.decoder.split("+"))


def recipes() -> list[Recipe]:
    """Reads the recipes that come with the package, the one to begin with first."""
    return [_recipe(name) for name in ORDER]


def _recipe(name: str) -> Recipe:
    content = read_recipe(SHIPPED[name])
    run = dict(content["measured"])
    models = {
        model: Measured({figure: Figure(**values) for figure, values in figures.items()})
        for model, figures in run.pop("models").items()
    }
    return Recipe(
        name=name,
        decoder=content["decoder"],
        summary=content["summary"],
        rows=content["rows"],
        chosen=content["chosen"],
        run=run,
        time=content["time"],
        models=models,
    )
