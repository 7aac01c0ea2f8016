"""`vlmfix recommend`: which decoder to take, and why."""

from __future__ import annotations

import math
import re

import click

from vlmfix.commands import options


def _times(value: str | None) -> float | None:
    if value is None:
        return None
    times = float(value.removesuffix("x")) if re.fullmatch(r"\d+(\.\d+)?x?", value) else math.nan
    if not 1 <= times < 1000:
        raise click.BadParameter(f"{value!r} is no number of times, such as 1.2x")
    return times


@click.command()
@click.option(
    "--model",
    type=options.ModelName(),
    help="The model: it is loaded, and every recipe tried on it.  [default: none in particular]",
)
@click.option("--keep-recall", is_flag=True, help="Lose none of what is in the picture: at most 0.02 of recall.")
@click.option(
    "--budget", type=_times, metavar="TIMES", help="Most time of a step against plain decoding, such as 1.2x."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def recommend(model: str | None, keep_recall: bool, budget: float | None, as_json: bool) -> None:
    """Say which decoder to take, and why.

    From what the recipes of vlmfix were measured to do, what can act on the model, and what rows cost; what others
    published stands apart, and decides nothing.
    """
    from vlmfix.advice.choice import advise
    from vlmfix.reports.recipes import advice_json, advice_text

    advice = advise(model, _refused(model) if model else {}, keep_recall=keep_recall, budget=budget)
    if as_json:
        options.say_json(advice_json(advice, model))
    else:
        click.echo(advice_text(advice, model))


def _refused(model: str) -> dict[str, str | None]:
    """Tries the recipes on a model, as ``vlmfix doctor`` does."""
    options.quieten()
    from vlmfix.advice.recipes import ORDER
    from vlmfix.display import counting, loading
    from vlmfix.doctor import diagnose

    with counting("recipes tried") as report:
        diagnosis = diagnose(model, decoders=[f"@{name}" for name in ORDER], loader=loading, progress=report)
    found: dict[str, str | None] = diagnosis["decoders"]
    return found
