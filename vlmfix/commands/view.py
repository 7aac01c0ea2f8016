"""`vlmfix view`: answers to look at, beside their pictures."""

from __future__ import annotations

from pathlib import Path

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError

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
@options.debug
def view(folders: tuple[Path, ...], out: Path | None, limit: int, serve: bool, images: Path | None) -> None:
    """Show the answers in each FOLDER beside their pictures, in one HTML page.

    A FOLDER is what vlmfix run or vlmfix eval wrote. Several are put side by side, by the contents of the pictures and
    by prompts, with the words marked that differ.
    """
    options.quieten()
    from vlmfix.view.folders import read_sheet
    from vlmfix.view.page import page_of, refuse_foreign, write_page

    if serve and out is not None:
        raise UsageError("--serve and --out are both given", "leave one of them out: --serve writes no file")
    file = out or folders[0] / "view.html"
    sheet = read_sheet(folders, images)
    for note in sheet.notes:
        options.say(f"vlmfix: {note}", err=True)
    if serve:
        from vlmfix.view.server import SheetServer

        with SheetServer(sheet, limit) as server:
            options.say(f"vlmfix: {len(sheet.cards)} pictures at {server.address} until Ctrl-C", err=True)
            server.serve_forever()
        return
    refuse_foreign(file)
    options.say(f"vlmfix: reading {min(limit, len(sheet.cards))} pictures", err=True)
    text = page_of(sheet, limit)
    write_page(file, text)
    left = len(sheet.cards) - limit
    if left > 0:
        options.say(f"vlmfix: {left} of {len(sheet.cards)} pictures are left out; see --limit and --serve", err=True)
    options.say(f"vlmfix: the answers beside their pictures: {file}", err=True)
