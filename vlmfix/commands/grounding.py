"""`vlmfix grounding`: what every token of an answer owes to the picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError
from vlmfix.settings import Settings

PAGE = "vlmfix grounding"
"""Name of the pages that the command makes."""
SCORES = ("picture", "prompt", "earlier", "preceding")


@click.command()
@click.argument("picture")
@click.argument("question")
@click.option("--answer", help="Judge this answer.  [default: the model's own]")
@click.option("--layers", default="all", show_default=True, help="Layers to average, such as all or 2:-1.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the scores: PNG, PDF or SVG.")
@click.option("--page", type=click.Path(path_type=Path), help="Write an HTML page: the picture under each word's map.")
@click.option(
    "--drop-sinks",
    is_flag=True,
    help="Leave out patches that draw attention whatever is asked, and of the mean stop words.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.generation_options("num_beams", *options.CHOSEN)
def grounding(
    *,
    picture: str,
    question: str,
    answer: str | None,
    layers: str,
    plot: Path | None,
    page: Path | None,
    drop_sinks: bool,
    as_json: bool,
    settings: Settings,
) -> None:
    """Show what each token of an answer about PICTURE to QUESTION owes to the picture and to the words before it.

    Scores are saliencies, attention times its gradient, averaged over heads and layers: compare them between tokens. A
    token that owes little to the token before it is more often a hallucinated one, says the method's paper. A decoder
    changes who answers, not who judges: that is always the plain model.
    """
    if not question.strip() or (answer is not None and not answer.strip()):
        raise UsageError("the question or the answer is empty", "write some words")
    options.quieten()
    if plot is not None:
        from vlmfix.figures import check_target

        check_target(plot)
    if page is not None:
        from vlmfix.view.page import refuse_foreign

        refuse_foreign(page, PAGE)
    from vlmfix.attention.edit import LayerSet
    from vlmfix.decoders import parse
    from vlmfix.display import loading
    from vlmfix.generation import check_settings
    from vlmfix.images import named_picture
    from vlmfix.insight.grounding import grounding as measure

    decoder, chosen = parse(settings.decoder), LayerSet(layers)
    check_settings(decoder, settings)
    shown = named_picture(picture)
    vlm = loading(settings.model, **settings.loading())
    judged: str | tuple[int, ...] = answer or ""
    if answer is None:
        said = vlm.generate(
            [shown],
            question,
            decoder=decoder,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )
        answer, judged = said[0].text, said[0].ids
    (found,) = measure(vlm, [shown], question, [judged], layers=chosen, drop_sinks=drop_sinks)
    rows = [_row(found, place) for place in range(len(found.tokens))]
    mean = {name: _number(found.mean(name)) for name in SCORES}
    if as_json:
        about = {"question": question, "answer": answer, "layers": layers, "drop_sinks": drop_sinks}
        options.say_json({**about, "mean": mean, "tokens": rows})
    else:
        options.say(answer, lines=True)
        click.echo(_table([*rows, {"text": "content words" if drop_sinks else "all tokens"} | mean]), nl=False)
    if page is not None:
        from vlmfix.view.heat import grounding_page
        from vlmfix.view.page import write_page

        made = grounding_page(vlm, shown, picture, question, answer, settings.decoder, PAGE, drop_sinks=drop_sinks)
        write_page(page, made, PAGE)
        options.say(f"vlmfix: the words on their picture: {page}", err=True)
    if plot is not None:
        from vlmfix.reports.grounding import draw

        draw(found, shown, vlm.layout(vlm.encode([question], [[shown]])), plot)
        options.say(f"vlmfix: drawn in {plot}", err=True)


def _row(found: Any, place: int) -> dict[str, Any]:  # noqa: ANN401 (its class needs torch, which comes late)
    scores = {name: _number(float(getattr(found, name)[place])) for name in SCORES}
    return {"token": found.tokens[place], "text": found.texts[place]} | scores


def _number(score: float) -> float | None:
    return None if math.isnan(score) else score


def _table(rows: list[dict[str, Any]]) -> str:
    from rich.table import Table

    from vlmfix.terminal import rendered

    table = Table(box=None, pad_edge=False)
    table.add_column("token")
    for name in SCORES:
        table.add_column(name, justify="right")
    for row in rows:
        scores = ["-" if row[name] is None else f"{row[name]:.4f}" for name in SCORES]
        table.add_row(row["text"].strip() or repr(row["text"])[1:-1], *scores)
    return rendered(table)
