"""Says what a decoder costs, from what was measured of rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmfix.advice.recipes import Recipe
from vlmfix.parsing import toml_of

FILE = Path(__file__).with_name("costs.toml")


@dataclass(frozen=True)
class Cost:
    """Holds what a decoder costs: the time of a step against plain greedy's with as many questions.

    Attributes:
        alone: With one question at a time.
        many: With several at once.
        together: How many those were.
        where: What it was measured on.
    """

    alone: float
    many: float
    together: int
    where: str

    @property
    def times(self) -> float:
        """Returns the higher of both."""
        return max(self.alone, self.many)

    def text(self) -> str:
        """Says both in words."""
        return (
            f"a step takes {self.alone:g} x as long as plain decoding's, {self.many:g} x with {self.together} at once"
        )


def cost(recipe: Recipe) -> Cost:
    """Returns what a recipe costs: from the GPU's table where its number of rows stands there, else from its own file.

    Args:
        recipe: The recipe. Beams are not in the table.
    """
    table = toml_of(FILE.read_bytes())
    for entry in table["rows"]:
        if entry["rows"] == recipe.rows:
            return Cost(entry["alone"], entry["many"], table["together"], table["machine"])
    own = recipe.time
    return Cost(own["alone"], own["many"], own["together"], own["machine"])
