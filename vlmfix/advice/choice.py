"""Chooses among the recipes: what acts, what fits the budget, what was measured to help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from vlmfix.advice.costs import Cost, cost
from vlmfix.advice.published import Published, published
from vlmfix.advice.recipes import KEPT, Measured, Recipe, recipes
from vlmfix.decoders.index import HOMES


@dataclass(frozen=True)
class Option:
    """Holds one recipe and what speaks against it.

    Attributes:
        recipe: The recipe.
        cost: What it costs.
        measured: What it did, by the model that counts: the one that is asked about, or all that were measured.
        against: Why it is not taken; empty when nothing speaks against it.
    """

    recipe: Recipe
    cost: Cost
    measured: Mapping[str, Measured]
    against: tuple[str, ...]

    @property
    def merit(self) -> float:
        """Returns the mean difference of F1, in which what is there and what is not weigh alike."""
        return fmean(one.figures["f1"].change for one in self.measured.values())


@dataclass(frozen=True)
class Advice:
    """Holds what is recommended.

    Attributes:
        decoder: What to give ``--decoder``: a recipe, or ``greedy`` when something speaks against each.
        own: Whether anything was measured on the model that is asked about.
        options: All recipes, with what speaks against them.
        published: What others published of vlmfix's methods, on another model.
    """

    decoder: str
    own: bool
    options: tuple[Option, ...]
    published: tuple[Published, ...]


def advise(
    model: str | None,
    refused: Mapping[str, str | None],
    *,
    keep_recall: bool = False,
    budget: float | None = None,
) -> Advice:
    """Recommends a decoder.

    Args:
        model: The model; None for none in particular.
        refused: Specification of a recipe -> why it cannot act on the model, as ``doctor`` found out.
        keep_recall: Takes only recipes that lose no more than ``KEPT`` of recall.
        budget: Most time of a step, against plain decoding's with as many questions.
    """
    found = recipes()
    own = any(model in recipe.models for recipe in found)
    options = tuple(_option(recipe, model, refused, keep_recall, budget) for recipe in found)
    free = [option for option in options if not option.against]
    best = max(free, key=lambda option: option.merit, default=None)
    taken = "greedy" if best is None else f"@{best.recipe.name}"
    return Advice(taken, own, options, tuple(published(HOMES)))


def _option(
    recipe: Recipe, model: str | None, refused: Mapping[str, str | None], keep_recall: bool, budget: float | None
) -> Option:
    measured = {name: one for name, one in recipe.models.items() if name == model} or recipe.models
    price = cost(recipe)
    against = []
    if reason := refused.get(f"@{recipe.name}"):
        against.append(f"it cannot act: {reason}")
    if budget is not None and price.times > budget:
        against.append(f"a step may take {price.times:g} x as long as plain decoding's, more than {budget:g} x")
    if not any(one.helps for one in measured.values()):
        against.append(f"it was not measured to help {' or '.join(measured)}")
    losing = [name for name, one in measured.items() if not one.keeps_recall]
    if keep_recall and losing:
        against.append(f"it loses more than {KEPT:g} of recall on {' and '.join(losing)}")
    return Option(recipe, price, measured, tuple(against))
