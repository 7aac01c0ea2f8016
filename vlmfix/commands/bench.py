"""`vlmfix bench`: what decoders cost here, each with the same model in the same run."""

from __future__ import annotations

import math
import shlex
import sys
import time
from pathlib import Path

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError

ROUNDS = 3
"""Rounds of a measurement that has the time."""


def _counts(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of numbers from 1 on, such as 1,8,32")
    return sorted({int(part) for part in parts})


@click.command()
@click.option(
    "--model", type=options.ModelName(), help="tiny, tiny-qwen, small, a Hub id, or a directory; with its own weights."
)
@click.option(
    "--shapes",
    type=click.Choice(["llava-1.5-7b", "qwen2.5-vl-7b", "tiny"]),
    help="A model of these shapes with random weights; tiny has its own.  [default: llava-1.5-7b on a GPU, else tiny]",
)
@click.option(
    "--decoder",
    "decoders",
    multiple=True,
    type=options.DecoderSpec(),
    help="Measured beside plain greedy, which always is; may be repeated.  [default: every method of vlmfix]",
)
@click.option("--rows", default="1,8", show_default=True, callback=_counts, help="Questions at once.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(min=16), help="Tokens of an answer.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), help="Show a picture so large that the prompt has about so many."
)
@click.option("--reference", is_flag=True, help="Also measure stock transformers, and methods as they are released.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Begin no measurement after this.  [default: no limit]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="auto: bfloat16 on a GPU (of --model: the checkpoint's own), float32 on the CPU.",
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all figures and what they come from.")
@options.debug
def bench(
    *,
    model: str | None,
    shapes: str | None,
    decoders: tuple[str, ...],
    rows: list[int],
    tokens: int,
    prompt_tokens: int | None,
    reference: bool,
    minutes: float | None,
    device: str,
    dtype: str,
    file: Path | None,
) -> None:
    """Measure what decoders cost: time to the first token, per step, memory.

    Every decoder gets its turn in each of three rounds, and figures are medians over them; docs/performance.md says how
    to read them.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    if model is not None and shapes is not None:
        raise UsageError("--model and --shapes are both given", "give one of them")
    options.quieten()
    from vlmfix.bench import arms, results
    from vlmfix.bench import shapes as made
    from vlmfix.bench.measure import Task, measured, refuse_other_device
    from vlmfix.decoders import parse
    from vlmfix.display import bench_text, counting
    from vlmfix.records import replace_json

    for spec in decoders:
        parse(spec)  # what is wrong with one is said before the model is made
    refuse_other_device(device)
    if file is not None:
        results.refuse_other_file(file)
    name = model or shapes or made.usual(device)
    options.say(f"vlmfix: making {name}", err=True)
    vlm = made.SHAPES[name](device=device, dtype=dtype) if model is None else made.checkpoint(model, device, dtype)
    vlm, pictures = made.shown(vlm, rows[-1], prompt_tokens)
    task, command = Task(vlm, pictures, tokens), shlex.join(["vlmfix", *sys.argv[1:]])
    facts = results.about(task, name, ROUNDS, command)
    compared = arms.arms_of(vlm, decoders, beside=reference)
    with counting("measurements") as report:
        for found in measured(task, compared, rows, rounds=ROUNDS, until=until, report=report):
            document = results.results(facts, found)
            if file is not None:
                replace_json(file, document)  # after every round: what is measured stays when the command is killed
    click.echo(bench_text(document), nl=False)
    if all(line["reason"] is not None for line in document["lines"]):
        click.get_current_context().exit(1)
