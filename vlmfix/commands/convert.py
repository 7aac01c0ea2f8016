"""`vlmfix convert`: the answers of a run in another form."""

from __future__ import annotations

from pathlib import Path

import click

from vlmfix.commands import options
from vlmfix.jobs.export import NAMES, export


@click.command("convert")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "kind", required=True, type=click.Choice(list(NAMES)), help="What to write.")
@click.option("--out", type=click.Path(path_type=Path), help="The file.  [default: answers.FORMAT in FOLDER]")
@options.debug
def convert(folder: Path, kind: str, out: Path | None) -> None:
    """Write the answers of FOLDER, which vlmfix run wrote, as a table or as COCO's results.

    csv and parquet have a row for every answer and every failure; parquet needs pip install 'vlmfix[parquet]'. coco has
    one caption for each picture, with a file beside it that says which number is which picture.
    """
    written(folder, kind, out)


def written(folder: Path, kind: str, out: Path | None = None) -> None:
    """Writes a folder's answers in another form, and says so."""
    done = export(folder, kind, out)
    if not done.finished:
        options.say(f"vlmfix: the run in {folder} is not finished; what it has so far is written", err=True)
    options.say(f"vlmfix: {done.rows} rows in {' and '.join(map(str, done.files))}", err=True)
