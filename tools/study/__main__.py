"""The command; see :func:`command`."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from pathlib import Path

import click

from tools.entry import run
from tools.study.clock import Clock
from tools.study.page import put, write
from tools.study.results import results
from tools.study.study import STAGES, Study, conduct
from tools.study.summary import summary
from vlmfix.errors import UsageError
from vlmfix.records import replace_json
from vlmfix.settings import EMBEDDED

PATH = click.Path(path_type=Path)
DECISIVE = ("models", "only", "count", "seed", "tuning_count", "tuning_seed", "trials", "stages", "dtype", "batch_size")
"""Options that a figure depends on."""


@click.command()
@click.option("--out", required=True, type=PATH, help="Folder of everything; goes on where it was.")
@click.option("--page", type=PATH, help="Page that gets the figures, between its marks.  [default: OUT/effects.md]")
@click.option("--summary", "brief", type=PATH, help="Page that gets a table of methods, between its marks.")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=tuple(EMBEDDED),
    show_default=True,
    help="Name or folder; may repeat.",
)
@click.option("--decoder", "only", multiple=True, metavar="SPEC", help="These alone.  [default: all, and chains]")
@click.option("--count", default=500, show_default=True, type=click.IntRange(2), help="Scenes that are reported.")
@click.option("--seed", default=303, show_default=True, type=click.IntRange(0), help="Theirs.")
@click.option("--tuning-count", default=300, show_default=True, type=click.IntRange(2), help="Scenes for tuning.")
@click.option("--tuning-seed", default=404, show_default=True, type=click.IntRange(0), help="Theirs.")
@click.option("--trials", default=32, show_default=True, type=click.IntRange(1), help="Of each search.")
@click.option(
    "--stage", "stages", multiple=True, type=click.Choice(STAGES), help="May repeat; in this order.  [default: all]"
)
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Processes on the device.")
@click.option("--minutes", type=click.FloatRange(0), help="Stop after so long; what is done is kept.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="cuda: all GPUs that CUDA_VISIBLE_DEVICES shows, with as many --jobs.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="auto: bfloat16 on a GPU, float32 on the CPU.",
)
@click.option("--batch-size", default=100, show_default=True, type=click.IntRange(1), help="Questions at a time.")
def command(
    *,
    out: Path,
    page: Path | None,
    brief: Path | None,
    models: tuple[str, ...],
    only: tuple[str, ...],
    count: int,
    seed: int,
    tuning_count: int,
    tuning_seed: int,
    trials: int,
    stages: tuple[str, ...],
    jobs: int,
    minutes: float | None,
    device: str,
    dtype: str,
    batch_size: int,
) -> None:
    """Measure what every decoder does to the embedded models, and write OUT/results.json and a page of tables.

    CHAIR and POPE with defaults and with parameters chosen on other scenes, small things for methods that refine the
    picture, and time per token. The page shows the stages that are asked for. Started again, it goes on where it was;
    with --minutes it stops by itself. The exit code is 1 when something is left or failed.
    """
    warnings.simplefilter("ignore")
    if seed == tuning_seed:
        raise UsageError(f"--seed and --tuning-seed are both {seed}", "tune on other scenes than those reported")
    clock = Clock(None if minutes is None else time.time() + 60 * minutes)
    study = Study(
        out=out,
        models=models,
        count=count,
        seed=seed,
        tuning_count=tuning_count,
        tuning_seed=tuning_seed,
        trials=trials,
        only=only,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        jobs=jobs,
        clock=clock,
    )
    out.mkdir(parents=True, exist_ok=True)
    done = conduct(study, stages or STAGES)
    found = results(study, stages or STAGES, _command(click.get_current_context()))
    replace_json(out / "results.json", found)
    write(page or out / "effects.md", found)
    if brief:
        put(brief, summary(found))
    click.echo(f"effects: {page or out / 'effects.md'}, {out / 'results.json'}", err=True)
    if not done:
        click.echo("effects: something is left; the same command goes on", err=True)
        sys.exit(1)


def _command(context: click.Context) -> str:
    """What gives the same figures: without what decides the pace alone."""
    words = ["python", "-m", "tools.study", "--out", "DIR"]
    for option in context.command.params:
        value = context.params[str(option.name)]
        if option.name in DECISIVE and value != option.get_default(context):
            for one in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0], str(one)]
    return shlex.join(words)


if __name__ == "__main__":
    run(command)
