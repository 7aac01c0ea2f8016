"""`vlmfix world` and `vlmfix demo`: the drawn world that comes with the package."""

from __future__ import annotations

from pathlib import Path

import click

from vlmfix.commands import options
from vlmfix.settings import EMBEDDED


@click.group()
def world() -> None:
    """The drawn world that the embedded model knows."""


@world.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--count", required=True, type=click.IntRange(min=1), help="Number of scenes.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the scenes.")
@options.debug
def make(directory: Path, count: int, seed: int) -> None:
    """Draw scenes into DIRECTORY, with COCO annotations, captions and POPE questions."""
    options.quieten()
    from vlmfix.display import counting
    from vlmfix.world import coco

    with counting("scenes") as report:
        coco.make(directory, count=count, seed=seed, progress=lambda done: report(done, count))
    options.say(f"vlmfix: {count} scenes in {directory}", err=True)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder to write.")
@click.option("--decoder", default="vcd", show_default=True, metavar="SPEC", help="The mitigation to show.")
@click.option(
    "--model", default="tiny", show_default=True, type=click.Choice(list(EMBEDDED)), help="Who describes them."
)
@click.option("--seed", default=20260, show_default=True, type=click.IntRange(min=0), help="Seed of the scenes.")
@options.debug
def demo(out: Path, decoder: str, model: str, seed: int) -> None:
    """Describe drawn scenes plain and mitigated.

    Objects that an answer mentions and the picture lacks are marked, here and in OUT/index.html.
    """
    options.quieten()
    from vlmfix.demo import demonstrate
    from vlmfix.display import comparison_text, loading

    comparison = demonstrate(out, decoder=decoder, model=model, seed=seed, loader=loading)
    click.echo(comparison_text(comparison), nl=False)
    options.say(f"vlmfix: the same with the pictures: {out / 'index.html'}", err=True)
