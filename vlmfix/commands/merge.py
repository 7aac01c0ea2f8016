"""`vlmfix merge`: the parts of a run, joined."""

from __future__ import annotations

from pathlib import Path

import click

from vlmfix.commands import options

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("folder", type=PATH, metavar="OUT")
@click.option("--into", type=PATH, help="Folder for the joined answers.  [default: OUT]")
@options.debug
def merge(folder: Path, into: Path | None) -> None:
    """Join what vlmfix run --shard I/N, or --steal, wrote below OUT into one folder of answers.

    All of it must be there and finished, with equal settings, and no question may stand twice; what is missing is
    told by name. The parts stay as they are.
    """
    options.quieten()
    from vlmfix.jobs.folder.merge import merge as join

    found = join(folder, into)
    if found.unlisted:
        options.say(
            f"vlmfix: the pictures were not listed, so the cards alone say that none is missing: {found.unlisted}",
            err=True,
        )
    totals = found.totals
    options.say(
        f"vlmfix: {totals.answers} answers and {totals.failed} failures of {found.shards} {found.parts} "
        f"are in {found.into}",
        err=True,
    )
