"""The command line, kept quick to start: each command imports what it needs when it runs."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vlmfix import __version__
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.records import to_json
from vlmfix.settings import Settings

INTERRUPTED = 130  # what a shell reports after Ctrl-C

_debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")

_OPTIONS = {
    "model": click.option("--model", default="tiny", show_default=True, help="tiny, a Hub id, or a directory."),
    "revision": click.option("--revision", help="Branch, tag or commit of a Hub model."),
    "device": click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    "dtype": click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="auto: the checkpoint's own on a GPU, float32 on the CPU.",
    ),
    "decoder": click.option(
        "--decoder",
        default="greedy",
        show_default=True,
        metavar="SPEC",
        help="name, or name:parameter=value,parameter=value; + joins several. See: vlmfix decoders.",
    ),
    "max_new_tokens": click.option(
        "--max-new-tokens",
        default=128,
        show_default=True,
        type=click.IntRange(min=1),
        help="Longest answer, in tokens.",
    ),
    "num_beams": click.option(
        "--num-beams", default=1, show_default=True, type=click.IntRange(min=1), help="Beam search from 2 on."
    ),
    "temperature": click.option(
        "--temperature",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0, 100),
        help="0 takes the most probable token; above, samples.",
    ),
    "seed": click.option(
        "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of sampling."
    ),
}


def _generation_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a command that generates, handed over as one ``settings``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_settings(**given: Any) -> None:
            settings = Settings(**{name: given.pop(name) for name in _OPTIONS if name in given})
            command(settings=settings, **given)

        for name, option in reversed(_OPTIONS.items()):
            if name not in left_out:
                with_settings = option(with_settings)
        return _debug(with_settings)

    return decorate


class _BatchSize(click.ParamType[int | None]):
    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:  # noqa: ANN401
        if value is None or value == "auto":
            return None
        try:
            rows = int(value)
        except ValueError:
            rows = 0
        if rows < 1:
            self.fail(f"{value!r} is neither auto nor a number of rows, 1 or more", param, ctx)
        return rows


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", message="%(version)s")
@_debug
def cli() -> None:
    """Fewer hallucinations from vision-language models, while they decode and without training."""


@cli.command()
@click.argument("pictures", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the answers.")
@click.option("--prompt", help="Asked about every picture.  [default: Please describe this image in detail.]")
@click.option("--prompts", type=click.Path(path_type=Path), help="CSV file with the columns prompt or image,prompt.")
@click.option("--batch-size", type=_BatchSize(), default="auto", show_default=True, help="Questions at a time.")
@_generation_options()
def run(
    pictures: Path,
    out: Path,
    prompt: str | None,
    prompts: Path | None,
    batch_size: int | None,
    settings: Settings,
) -> None:
    """Ask about every picture in PICTURES, a folder or a file.

    Answers go to OUT/answers.jsonl, failures to OUT/failed.jsonl, settings and totals to OUT/run.json.
    Started again with the same options, it goes on where it was.
    """
    if prompt is not None and prompts is not None:
        raise UsageError("--prompt and --prompts are both given", "give one of them")
    _quieten()
    from vlmfix import folder
    from vlmfix.display import loading, run_display, summary

    if prompts is not None:
        questions = folder.Questions.file(prompts)
    else:
        questions = folder.Questions.text(folder.DESCRIBE if prompt is None else prompt)
    try:
        with run_display() as report:
            end = folder.run(
                pictures,
                out,
                questions=questions,
                settings=settings,
                batch_size=batch_size,
                report=report,
                loader=loading,
            )
    except KeyboardInterrupt:
        click.echo(f"vlmfix: stopped; what is done is in {out}. The same command goes on from there.", err=True)
        click.get_current_context().exit(INTERRUPTED)
    click.echo(summary(end, out), err=True)


@cli.command()
@click.argument("picture", type=click.Path(path_type=Path))
@click.argument("question")
@_generation_options("num_beams")
def ask(picture: Path, question: str, settings: Settings) -> None:
    """Ask one QUESTION about one PICTURE."""
    if not question.strip():
        raise UsageError("the question is empty", "write a question or an instruction")
    _quieten()
    from vlmfix.decoders import parse
    from vlmfix.display import loading
    from vlmfix.images import open_picture

    if not picture.exists():
        raise UsageError(f"there is no file {picture}", "give a picture")
    decoder = parse(settings.decoder)
    try:
        shown = open_picture(picture).image
    except DataError as error:
        raise DataError(f"{picture}: {error.message}", "give a JPEG, PNG, WebP, TIFF, BMP or GIF file") from error
    vlm = loading(settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype)
    pieces = vlm.stream(
        shown,
        question,
        decoder=decoder,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_debug
def decoders(as_json: bool) -> None:
    """List the decoders with their parameters."""
    _quieten()
    from vlmfix.decoders import DECODERS, describe
    from vlmfix.display import decoder_tables, info_json

    infos = [describe(decoder) for decoder in DECODERS.values()]
    if as_json:
        click.echo(to_json([info_json(info) for info in infos], indent=2))
    else:
        click.echo(decoder_tables(infos), nl=False)


@cli.command()
@click.argument("model", default="tiny")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_debug
def doctor(model: str, revision: str | None, as_json: bool) -> None:
    """Say which decoders work with MODEL, and what this machine has."""
    _quieten()
    from vlmfix.display import diagnosis_text
    from vlmfix.doctor import diagnose

    diagnosis = diagnose(model, revision=revision)
    click.echo(to_json(diagnosis, indent=2) if as_json else diagnosis_text(diagnosis))


@cli.group()
def world() -> None:
    """The drawn world that the embedded model knows."""


@world.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--count", required=True, type=click.IntRange(min=1), help="Number of scenes.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the scenes.")
@_debug
def make(directory: Path, count: int, seed: int) -> None:
    """Draw scenes into DIRECTORY, with COCO annotations, captions and POPE questions."""
    _quieten()
    from vlmfix.display import counting
    from vlmfix.world import coco

    with counting("scenes") as report:
        coco.make(directory, count=count, seed=seed, progress=lambda done: report(done, count))
    click.echo(f"vlmfix: {count} scenes in {directory}", err=True)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder to write.")
@click.option("--decoder", default="vcd", show_default=True, metavar="SPEC", help="The mitigation to show.")
@click.option("--seed", default=20260, show_default=True, type=click.IntRange(min=0), help="Seed of the scenes.")
@_debug
def demo(out: Path, decoder: str, seed: int) -> None:
    """Describe drawn scenes plain and mitigated.

    Objects that an answer mentions and the picture lacks are marked, here and in OUT/index.html.
    """
    _quieten()
    from vlmfix.demo import demonstrate
    from vlmfix.display import comparison_text, loading

    comparison = demonstrate(out, decoder=decoder, seed=seed, loader=loading)
    click.echo(comparison_text(comparison), nl=False)
    click.echo(f"vlmfix: the same with the pictures: {out / 'index.html'}", err=True)


def main() -> None:
    """Runs the command line; exit code 2 for wrong use, 1 for failure, 130 after Ctrl-C."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        code = cli.main(arguments, prog_name="vlmfix", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "vlmfix"
        _explain(error, error.format_message(), f"see {command} --help", debug=debug)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("vlmfix: stopped", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left; leave as quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except VlmfixError as error:
        _explain(error, error.message, error.hint, debug=debug)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:  # a fault of ours: one line, and the way to the rest
        _explain(error, f"{type(error).__name__}: {error}", "use --debug for the traceback", debug=debug)
        return 1
    return code if isinstance(code, int) else 0  # click returns the code of an early exit, such as --help's


def _explain(error: Exception, message: str, hint: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    click.echo(f"vlmfix: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def _quieten() -> None:
    """Keeps third-party chatter off the terminal: warnings, the bar of transformers' loading, the Hub's retries."""
    warnings.simplefilter("ignore")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
