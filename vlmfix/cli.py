"""The command line, kept quick to start: each command imports what it needs when it runs."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextlib import suppress

import click

from vlmfix import __version__
from vlmfix.commands import (
    about,
    answers,
    bench,
    compare,
    convert,
    evaluate,
    explain,
    export,
    grounding,
    merge,
    new,
    options,
    profile,
    recommend,
    serve,
    status,
    tune,
    view,
    world,
)
from vlmfix.errors import SystematicError, UsageError, VlmfixError
from vlmfix.files import FULL

OUTPUT_FAILS = (*FULL, errno.EIO, errno.EFBIG, errno.EBADF)
"""What writing to standard output can end with; what is written to files has messages of its own."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", message="%(version)s")
@options.debug
def cli() -> None:
    """Fewer hallucinations from vision-language models, while they decode and without training."""


for _command in (
    answers.run,
    answers.ask,
    status.status,
    merge.merge,
    convert.convert,
    grounding.grounding,
    evaluate.evaluate,
    view.view,
    compare.compare,
    compare.reproduce,
    tune.tune,
    profile.profile,
    bench.bench,
    serve.serve,
    about.decoders,
    explain.explain,
    export.export,
    about.doctor,
    recommend.recommend,
    new.new,
    world.world,
    world.demo,
):
    cli.add_command(_command)
evaluate.evaluate.add_command(compare.score)


def main() -> None:
    """Runs the command line; exit code 2 for wrong use, 1 for failure, 130 after Ctrl-C."""
    _open_closed_streams()
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt:  # once more, while the first was being answered
        code = options.INTERRUPTED
    if code == options.INTERRUPTED:
        os._exit(code)  # a thread may still be at work, and an interpreter that ends under it is aborted
    sys.exit(code)


def _open_closed_streams() -> None:
    """Gives a standard stream that was closed before the start an end, so that no file of results takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        code = cli.main(arguments, prog_name="vlmfix", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:  # a group without its command
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "vlmfix"
        _explain(error, error.format_message(), f"see {command} --help", debug=debug)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("vlmfix: stopped", err=True)
        return options.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left; leave as quietly
        _give_up_output()
        return 1
    except SystematicError as error:
        _explain(error, error.message, _upstream_fault() or error.hint, debug=debug)
        return 1
    except VlmfixError as error:
        _explain(error, error.message, error.hint, debug=debug)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        if error.errno not in OUTPUT_FAILS or error.filename is not None:
            return _fault(error, debug=debug)
        _give_up_output()
        _explain(
            error, f"cannot write the output: {error.strerror}", "free some space, or write elsewhere", debug=debug
        )
        return 1
    except Exception as error:  # a fault of ours, or of what is installed: one line, and the way to the rest
        return _fault(error, debug=debug)
    return code if isinstance(code, int) else 0  # click returns the code of an early exit, such as --help's


def _fault(error: Exception, *, debug: bool) -> int:
    hint = _upstream_fault() or "use --debug for the traceback"
    _explain(error, f"{type(error).__name__}: {error}", hint, debug=debug)
    return 1


def _give_up_output() -> None:
    """Lets what standard output still holds go, which would be written once more at the end of the process."""
    with suppress(OSError):  # a stream that is no file has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _upstream_fault() -> str | None:
    """What is wrong with the installed transformers or torch, when an error may come from there."""
    try:
        from vlmfix.upstream.contracts import fault
    except ImportError:  # a module or a name that the room needs at once has moved
        from vlmfix.upstream.versions import remedy

        return remedy()
    return fault()


def _explain(error: Exception, message: str, hint: str, *, debug: bool) -> None:
    ours = isinstance(error, VlmfixError)  # one line each, whatever names are in it; other packages write several
    with suppress(OSError):  # the standard error may be full or gone, and the exit code still says what happened
        if debug:
            options.say("".join(traceback.format_exception(error)), err=True, nl=False, lines=True)
        options.say(f"vlmfix: {message}", err=True, lines=not ours)
        if hint:
            options.say(f"hint: {hint}", err=True, lines=True)
