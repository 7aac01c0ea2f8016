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
    """

    plain: float
    change: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Returns whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def text(self) -> str:
        """Writes the difference with its interval."""
        return f"{self.change:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Measured:
    """Holds what a recipe did to one model.

    Attributes:
        figures: ``chair_i`` (share of mentioned objects that are not there), ``recall`` (share of the objects in the
            pictures that are mentioned) and ``f1`` (both weighed alike).
        time: Seconds of an answer against plain decoding's, in the same run.
    """

    figures: Mapping[str, Figure]
    time: float

    @property
    def keeps_recall(self) -> bool:
        """Returns whether recall falls by no more than ``KEPT``."""
        return self.figures["recall"].change >= -KEPT

    @property
    def helps(self) -> bool:
        """Returns whether clearly fewer of the mentioned objects are absent."""
        return self.figures["chair_i"].high < 0


@dataclass(frozen=True)
class Recipe:
    """Holds one recipe.

    Attributes:
        name: What it is called behind ``@``.
        decoder: The specification.
        summary: What it does, in a sentence.
        rows: Rows that the model computes for a question: beams times branches.
        run: How it was measured: task, scenes, seed, commands, machine, versions, revision.
        models: What it did to each model, by the model's name.
    """

    name: str
    decoder: str
    summary: str
    rows: int
    run: Mapping[str, Any]
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
    models = {model: _measured(values) for model, values in run.pop("models").items()}
    return Recipe(name, content["decoder"], content["summary"], content["rows"], run, models)


def _measured(values: Mapping[str, Any]) -> Measured:
    figures = {name: Figure(**figure) for name, figure in values.items() if isinstance(figure, dict)}
    return Measured(figures, values["time"])
