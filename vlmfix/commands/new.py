"""`vlmfix new`: the first files of a decoder of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from vlmfix.commands import options


@click.group()
def new() -> None:
    """Write the first files of a method of your own."""


@new.command()
@click.argument("name")
@click.option(
    "--kind",
    default="logits",
    show_default=True,
    type=click.Choice(["logits", "attention", "picture"]),
    help="What it changes: logits by a contrast branch, attention by an edit, or the picture.",
)
@options.debug
def decoder(name: str, kind: str) -> None:
    """Write a decoder that works, NAME.py, and its test, test_NAME.py, into this folder.

    Both are there to be changed; docs/extending.md says how. What is there already is not overwritten.
    """
    from vlmfix.scaffold import write

    path, test, cls = write(name, kind, Path())
    options.say(f"{path} has the decoder, and {test} its test. Next:")
    for command in (
        f"pytest {test}",
        f'vlmfix ask PICTURE "QUESTION" --decoder {path}:{cls}',
        f"vlmfix doctor --decoder {path}:{cls}",
        f"vlmfix run FOLDER --out answers --decoder {path}:{cls}",
    ):
        options.say(f"  {command}")
