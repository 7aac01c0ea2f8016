"""What people read of recipes: what they were measured to do, and which of them is recommended; needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vlmfix.advice.choice import Advice, Option
from vlmfix.advice.published import about
from vlmfix.advice.recipes import Recipe
from vlmfix.terminal import rendered


def recipe_table(recipes: Sequence[Recipe]) -> list[RenderableType]:
    """Recipes with what each was measured to do to each model, and what the figures are."""
    table = Table(box=None, pad_edge=False)
    for title in ("recipe", "model", "of what is named, absent", "of what is there, named", "scenes"):
        table.add_column(title)
    for recipe in recipes:
        for model, measured in recipe.models.items():
            invented, recall = measured.figures["chair_i"], measured.figures["recall"]
            said = "" if measured.helps else "; no clear help"
            figures = (f"{invented.text()}{said}", recall.text())
            table.add_row(f"@{recipe.name}", model, *figures, str(recipe.run["scenes"]))
    what = "Differences to plain decoding with 95 % intervals (CHAIR_i, recall), on drawn scenes: docs/recipes.md"
    return [table, Text(what), *(Text(f"@{recipe.name} is {recipe.decoder}") for recipe in recipes)]


def advice_text(advice: Advice, model: str | None) -> str:
    """What is recommended, why, and what is known besides."""
    return rendered(*_lines(advice, model)).rstrip("\n")


def _lines(advice: Advice, model: str | None) -> Iterator[RenderableType]:
    yield Text(f"Take --decoder {advice.decoder}", style="bold")
    taken = [option for option in advice.options if f"@{option.recipe.name}" == advice.decoder]
    if not taken:
        yield Text("That is plain decoding: something speaks against every recipe.")
    for option in taken:
        yield Text(option.recipe.summary)
        yield Text(f"It is {option.recipe.decoder}.")
    if not advice.own:
        which = "no model was named (--model)" if model is None else f"nothing was measured on {model}"
        yield Text(f"Measured on the three small models that come with vlmfix, on drawn scenes; {which}.")
    yield ""
    for option in advice.options:
        yield Text(f"@{option.recipe.name}{'' if option.against else ': nothing speaks against it'}")
        yield from (Text(f"  against it: {reason}") for reason in option.against)
        yield from (Text(f"  {line}") for line in _measured(option))
    yield ""
    model_of, task = about()
    yield Text(
        f"Published by others, measured on {model_of}, not here ({task}; points against each source's own plain row):"
    )
    for decoder, group in groupby(advice.published, key=lambda one: one.decoder):
        yield Text(f"  {decoder}: " + ", ".join(f"{one.change:+.1f} ({one.known_from})" for one in group))


def _measured(option: Option) -> Iterator[str]:
    run = option.recipe.run
    for name, measured in option.measured.items():
        invented, recall = measured.figures["chair_i"], measured.figures["recall"]
        yield (
            f"{name}: of what is named, absent {invented.plain:.3f}, {invented.text()}; of what is there, named "
            f"{recall.plain:.3f}, {recall.text()} ({run['scenes']} drawn scenes of seed {run['seed']})"
        )
    yield f"{option.cost.text()} ({option.cost.where})"


def advice_json(advice: Advice, model: str | None) -> dict[str, Any]:
    """The same as JSON values."""
    model_of, task = about()
    options = [
        {**asdict(option), "recipe": {**asdict(option.recipe), "spec": f"@{option.recipe.name}"}}
        for option in advice.options
    ]
    return {
        "model": model,
        "decoder": advice.decoder,
        "measured_on_model": advice.own,
        "options": options,
        "published": {"model": model_of, "task": task, "figures": [asdict(one) for one in advice.published]},
    }
