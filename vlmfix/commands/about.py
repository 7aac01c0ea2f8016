"""`vlmfix decoders` and `vlmfix doctor`: what there is, and what works here."""

from __future__ import annotations

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Say of every decoder what is said of a named one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, parameters included.")
@options.debug
def decoders(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """List the decoders; of those that are named, say what they do, with parameters and presets."""
    options.quieten()
    from vlmfix.decoders import DECODERS, describe
    from vlmfix.display import decoder_pages, decoder_table, info_json

    for name in names:
        if name not in DECODERS:
            raise UsageError(f"unknown decoder {name!r}", f"known decoders: {', '.join(DECODERS)}")
    infos = [describe(DECODERS[name]) for name in names or DECODERS]
    if as_json:
        options.say_json([info_json(info) for info in infos])
    else:
        click.echo(decoder_pages(infos) if names or everything else decoder_table(infos), nl=False)


@click.command()
@click.argument("model", default="tiny")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def doctor(model: str, revision: str | None, as_json: bool) -> None:
    """Try every decoder on MODEL, check what vlmfix builds on, and say what this machine has."""
    options.quieten()
    from vlmfix.display import counting, diagnosis_text, loading
    from vlmfix.doctor import diagnose

    with counting("decoders tried") as report:
        diagnosis = diagnose(model, revision=revision, loader=loading, progress=report)
    if as_json:
        options.say_json(diagnosis)
    else:
        click.echo(diagnosis_text(diagnosis))
