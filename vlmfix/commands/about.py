"""`vlmfix decoders` and `vlmfix doctor`: what there is, and what works here."""

from __future__ import annotations

import click

from vlmfix.commands import options
from vlmfix.records import to_json


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def decoders(as_json: bool) -> None:
    """List the decoders with their parameters."""
    options.quieten()
    from vlmfix.decoders import DECODERS, describe
    from vlmfix.display import decoder_tables, info_json

    infos = [describe(decoder) for decoder in DECODERS.values()]
    if as_json:
        click.echo(to_json([info_json(info) for info in infos], indent=2))
    else:
        click.echo(decoder_tables(infos), nl=False)


@click.command()
@click.argument("model", default="tiny")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def doctor(model: str, revision: str | None, as_json: bool) -> None:
    """Say which decoders work with MODEL, and what this machine has."""
    options.quieten()
    from vlmfix.display import diagnosis_text
    from vlmfix.doctor import diagnose

    diagnosis = diagnose(model, revision=revision)
    click.echo(to_json(diagnosis, indent=2) if as_json else diagnosis_text(diagnosis))
