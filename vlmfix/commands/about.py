"""`vlmfix decoders` and `vlmfix doctor`: what there is, and what works here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from vlmfix.commands import options
from vlmfix.errors import PluginError


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", type=options.DecoderName())
@click.option("--all", "everything", is_flag=True, help="Say of every decoder what is said of a named one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, parameters included.")
@options.debug
def decoders(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """List recipes and decoders; of decoders that are named, say what they do, with parameters and presets.

    A decoder in a file is named by path/to/file.py:CLASS. What other distributions add is listed by name, and imported
    when it is named, or with --all or --json.
    """
    from vlmfix.advice.recipes import recipes
    from vlmfix.decoders.index import DECODERS, own
    from vlmfix.reports.decoders import decoder_pages, decoder_table

    known, plugins = own(), DECODERS.plugins()
    for sentence in DECODERS.refused():
        options.say(f"vlmfix: {sentence}", err=True)
    if not (names or everything or as_json):
        click.echo(decoder_table(list(known.values()), list(plugins.values()), recipes()), nl=False)
        return
    infos = [known[name] if name in known else _described(name) for name in names]
    if not names:
        infos = list(known.values())
        for name in plugins:
            try:
                infos.append(_described(name))
            except PluginError as error:  # it stops nothing but itself
                options.say(f"vlmfix: {error.message}", err=True)
    if as_json:
        options.say_json([asdict(info) for info in infos])
    else:
        click.echo(decoder_pages(infos), nl=False)


def _described(name: str) -> Any:  # noqa: ANN401 (a DecoderInfo, whose module is imported where it is needed)
    """Imports a plug-in, and with it torch, and describes it."""
    options.quieten()
    from vlmfix.decoders import DECODERS, describe

    return describe(DECODERS[name])


@click.command()
@click.argument("model", default="tiny", type=options.ModelName())
@click.option(
    "--decoder",
    "decoders",
    multiple=True,
    type=options.DecoderSpec(),
    help="Try this one, with its parameters; may be repeated.  [default: every decoder]",
)
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def doctor(model: str, decoders: tuple[str, ...], revision: str | None, as_json: bool) -> None:
    """Try every decoder on MODEL, check what vlmfix builds on, and say what this machine has."""
    options.quieten()
    from vlmfix.display import counting, diagnosis_text, loading
    from vlmfix.doctor import diagnose

    with counting("decoders tried") as report:
        diagnosis = diagnose(model, revision=revision, decoders=decoders, loader=loading, progress=report)
    if as_json:
        options.say_json(diagnosis)
    else:
        click.echo(diagnosis_text(diagnosis))
