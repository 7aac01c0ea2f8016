"""How a tool ends: one line for what is wrong, and an exit code."""

from __future__ import annotations

import sys

import click

from vlmfix.commands.options import INTERRUPTED
from vlmfix.errors import UsageError, VlmfixError


def run(command: click.Command) -> None:
    """Run a command on the words behind the module's name.

    The exit code is 2 for wrong use, 1 for failure and 130 after Ctrl-C.

    Args:
        command: As click made it.
    """
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    except VlmfixError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("error: stopped", err=True)
        sys.exit(INTERRUPTED)
