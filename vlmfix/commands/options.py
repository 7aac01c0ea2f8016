"""What several commands share: options, what every command does first, and how it ends after Ctrl-C."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from vlmfix.parsing import escaped
from vlmfix.records import to_json
from vlmfix.settings import ATTENTIONS, REQUESTED, Settings, check_attention

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it."""


class DecoderSpec(click.ParamType[str]):
    """Takes a specification of a decoder, and checks its names at once, which needs no torch."""

    name = "SPEC"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the specification as it is.

        Raises:
            UsageError: A name in it is not known.
        """
        from vlmfix.decoders.index import check

        check(value)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes the last name of a chain, or the last parameter of its last decoder."""
        from vlmfix.decoders.index import DECODERS, own
        from vlmfix.language.recipe import SHIPPED

        before, plus, last = incomplete.rpartition("+")
        if last.startswith("@"):
            return _completed(SHIPPED, last[1:], f"{before}{plus}@") or [CompletionItem(incomplete, type="file")]
        name, colon, given = last.partition(":")
        if not colon:
            found = _completed(DECODERS, last, before + plus)
            return found or [CompletionItem(incomplete, type="file")]
        earlier, comma, begun = given.rpartition(",")
        known = [f"{parameter.name}=" for parameter in own()[name].parameters] if name in own() else []
        return _completed(known, begun, f"{before}{plus}{name}:{earlier}{comma}")


class DecoderName(click.ParamType[str]):
    """Takes the name of a decoder, or a file and a class."""

    name = "NAME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name as it is.

        Raises:
            UsageError: There is no such decoder.
        """
        from vlmfix.decoders.index import DECODERS

        DECODERS.check(value)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes the names of decoders, or else files."""
        from vlmfix.decoders.index import DECODERS

        return _completed(DECODERS, incomplete) or [CompletionItem(incomplete, type="file")]


class ProfilerNames(click.ParamType[list[str]]):
    """Takes names of profilers with commas between them."""

    name = "NAME[,NAME...]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Returns the names.

        Raises:
            UsageError: One is not known.
        """
        from vlmfix.heads.profilers import PROFILERS

        names = [name.strip() for name in value.split(",")]
        for name in names:
            PROFILERS.check(name)
        return names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes the last name."""
        from vlmfix.heads.profilers import PROFILERS

        before, comma, last = incomplete.rpartition(",")
        return _completed(PROFILERS, last, before + comma) or [CompletionItem(incomplete, type="file")]


class MethodNames(click.ParamType[list[str]]):
    """Takes names of methods that read directions, with commas between them."""

    name = "NAME[,NAME...]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Returns the names; ``measurements_of`` says which are known."""
        return [name.strip() for name in value.split(",")]


class ModelName(click.ParamType[str]):
    """Takes the name of a model, and tells a misspelt one of those that come with the package at once."""

    name = "TEXT"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name as it is.

        Raises:
            UsageError: It is nearly the name of an embedded model.
        """
        from vlmfix.settings import check_model_name

        check_model_name(value)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes the embedded models, or else directories."""
        from vlmfix.settings import EMBEDDED

        return _completed(EMBEDDED, incomplete) or [CompletionItem(incomplete, type="dir")]


class AttentionName(click.Choice[str]):
    """Takes a way to compute attention, and says why flash-attn is none of them."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name as it is.

        Raises:
            UsageError: It is another.
        """
        check_attention(value)
        return value


def _completed(names: Iterable[str], begun: str, before: str = "") -> list[CompletionItem]:
    return [CompletionItem(before + name) for name in names if name.startswith(begun)]


debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")

_OPTIONS = {
    "model": click.option(
        "--model",
        default="tiny",
        show_default=True,
        type=ModelName(),
        help="tiny, tiny-qwen, small, a Hub id, or a directory.",
    ),
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
        type=DecoderSpec(),
        help="@RECIPE, or NAME or FILE.py:CLASS, then :parameter=value,...; + joins. See: vlmfix decoders.",
    ),
    "max_new_tokens": click.option(
        "--max-new-tokens",
        default=128,
        show_default=True,
        type=click.IntRange(min=1),
        help="Longest answer, in tokens.",
    ),
    "num_beams": click.option(
        "--num-beams",
        default=1,
        show_default=True,
        type=click.IntRange(min=1),
        help="Beam search from 2 on; of one decoder alone: beam.",
    ),
    "temperature": click.option(
        "--temperature",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0, 100),
        help="0 takes the most probable token; above, samples; of one decoder alone: sample.",
    ),
    "top_k": click.option(
        "--top-k", type=click.IntRange(min=1), help="Sample from so many of the most probable tokens.  [default: all]"
    ),
    "top_p": click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Sample from the most probable tokens that make up this share.  [default: all]",
    ),
    "seed": click.option(
        "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of sampling."
    ),
    "repetition_penalty": click.option(
        "--repetition-penalty",
        type=click.FloatRange(0, 100, min_open=True),
        help="Above 1, tokens that the prompt or the answer has become less probable.  [default: 1]",
    ),
    "stop": click.option("--stop", multiple=True, help="End answers before this text; may be given several times."),
    "system": click.option("--system", help="System message.  [default: the chat template's own]"),
    "max_pixels": click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        help="Most pixels that a Qwen-VL processor makes of a picture.  [default: its own]",
    ),
    "min_pixels": click.option(
        "--min-pixels",
        type=click.IntRange(min=1),
        help="Fewest pixels, likewise: smaller pictures are enlarged.  [default: its own]",
    ),
    "device_map": click.option(
        "--device-map",
        type=click.Choice(["auto"]),
        help="auto: layers spread over all GPUs, and the memory beside them.  [default: one device]",
    ),
    "quantize": click.option(
        "--quantize",
        type=click.Choice(["int8", "int4"]),
        help="Weights of 8 or 4 bits, on a GPU; needs bitsandbytes.  [default: as they are]",
    ),
    "attention": click.option(
        "--attention",
        type=AttentionName(ATTENTIONS),
        help="How attention is computed where no decoder edits it.  [default: sdpa]",
    ),
}


CHOSEN = tuple(REQUESTED)
"""Options of what a model is told and how it ends, for commands that leave them out."""


def generation_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a command that generates, handed over as one ``settings``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_settings(**given: Any) -> None:
            settings = Settings(**{name: given.pop(name) for name in _OPTIONS if name not in left_out})
            command(settings=settings, **given)

        for name, option in reversed(_OPTIONS.items()):
            if name not in left_out:
                with_settings = option(with_settings)
        return debug(with_settings)

    return decorate


def retry_failed(where: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option that asks failed questions again.

    Args:
        where: Where their failures are kept.
    """
    return click.option("--retry-failed", is_flag=True, help=f"Ask again what failed before, as {where} says.")


def _rows(value: str) -> int | None:
    rows = int(value) if value.isascii() and value.isdigit() else 0
    if value != "auto" and rows < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of rows, 1 or more")
    return rows or None


def batch_size(help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option ``--batch-size``: a number of rows, or auto, which becomes None."""
    return click.option("--batch-size", type=_rows, default="auto", show_default=True, metavar="auto|N", help=help)


def say(text: str, *, err: bool = False, nl: bool = True, lines: bool = False) -> None:
    """Prints a text that holds names, answers or messages from elsewhere; their control characters are shown.

    Args:
        text: What is said; what ``rendered`` and the like have made for the terminal is printed as it is instead.
        err: Prints it on the standard error.
        nl: Ends the line.
        lines: Says that the text has lines of its own.
    """
    click.echo(escaped(text, lines=lines), err=err, nl=nl)


def say_json(value: Any) -> None:  # noqa: ANN401 (what JSON can hold has no name)
    """Prints JSON."""
    say(to_json(value, indent=2), lines=True)


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Says, when somebody stops the work, that the same command goes on with it, and ends this one.

    Args:
        out: Folder of what is done.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"vlmfix: stopped; what is done is in {out}. The same command goes on from there.", err=True)
        click.get_current_context().exit(INTERRUPTED)


def quieten() -> None:
    """Keeps others' chatter off the terminal: warnings, libtiff, transformers' bar of loading, the Hub's retries."""
    warnings.simplefilter("ignore")
    from huggingface_hub.utils import logging as hub_logging
    from transformers import logging as transformers_logging

    from vlmfix.upstream import libtiff

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    libtiff.silence()
