"""`vlmfix view`: answers to look at, beside their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError

if TYPE_CHECKING:
    from vlmfix.view.page import Heating
    from vlmfix.view.sheet import Sheet

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("folders", type=PATH, nargs=-1, required=True, metavar="FOLDER...")
@click.option("--out", type=PATH, help="The page.  [default: view.html in the first FOLDER]")
@click.option(
    "--limit",
    default=200,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most pictures in the page; with --serve, in one page.",
)
@click.option("--serve", is_flag=True, help="Show all in a browser, page by page, until Ctrl-C; writes nothing.")
@click.option("--images", type=PATH, help="Folder of the pictures.  [default: where they were]")
@click.option("--grounding", is_flag=True, help="Load the models, and map what every word owes to its picture.")
@click.option("--model", type=PATH, help="Directory of the model, for --grounding.  [default: where it was]")
@options.debug
def view(
    folders: tuple[Path, ...],
    out: Path | None,
    limit: int,
    serve: bool,
    images: Path | None,
    grounding: bool,
    model: Path | None,
) -> None:
    """Show the answers in each FOLDER beside their pictures, in one HTML page.

    A FOLDER is what vlmfix run or vlmfix eval wrote. Several are put side by side, by the contents of the pictures and
    by prompts, with the words marked that differ.
    """
    options.quieten()
    from vlmfix.view.folders import read_sheet

    if serve and out is not None:
        raise UsageError("--serve and --out are both given", "leave one of them out: --serve writes no file")
    if model is not None and not grounding:
        raise UsageError("--model is for --grounding alone", "leave it out: a page needs no model")
    file = out or folders[0] / "view.html"
    sheet = read_sheet(folders, images)
    for note in sheet.notes:
        options.say(f"vlmfix: {note}", err=True)
    if not grounding:
        _shown(sheet, file, limit, serve=serve)
        return
    from vlmfix.display import counting, loading
    from vlmfix.view.heat import Heat

    heat = Heat(sheet.columns, model=None if model is None else str(model), loader=loading)
    if serve:
        _shown(sheet, file, limit, serve=True, heat=heat)
        return
    with counting("pictures") as heat.report:
        _shown(sheet, file, limit, serve=False, heat=heat)


def _shown(sheet: Sheet, file: Path, limit: int, *, serve: bool, heat: Heating = list) -> None:
    """Serves a sheet, or writes it."""
    from vlmfix.view.page import page_of, refuse_foreign, write_page

    if serve:
        from vlmfix.view.server import SheetServer

        with SheetServer(sheet, limit, heat) as server:
            options.say(f"vlmfix: {len(sheet.cards)} pictures at {server.address} until Ctrl-C", err=True)
            server.serve_forever()
        return
    refuse_foreign(file)
    options.say(f"vlmfix: reading {min(limit, len(sheet.cards))} pictures", err=True)
    text = page_of(sheet, limit, heat=heat)
    write_page(file, text)
    left = len(sheet.cards) - limit
    if left > 0:
        options.say(f"vlmfix: {left} of {len(sheet.cards)} pictures are left out; see --limit and --serve", err=True)
    options.say(f"vlmfix: the answers beside their pictures: {file}", err=True)
