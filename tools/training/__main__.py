"""Train an embedded model: `python -m tools.training --out DIR`."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

import click

from tools.entry import run
from vlmfix.errors import VlmfixError

_SHARE = click.FloatRange(0, 1)


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory to write.")
@click.option(
    "--architecture",
    default="llava",
    type=click.Choice(["llava", "qwen2_5_vl"]),
    show_default=True,
    help="Kind of model.",
)
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="Seed of weights, scenes, texts.")
@click.option(
    "--language-steps", default=300, type=click.IntRange(0), show_default=True, help="Batches of language alone."
)
@click.option("--steps", default=11_000, type=click.IntRange(1), show_default=True, help="Batches with pictures.")
@click.option(
    "--minutes", default=math.inf, type=click.FloatRange(0, min_open=True), help="Stop after this time at the latest."
)
@click.option("--scenes", default=60_000, type=click.IntRange(1), show_default=True, help="Scenes to draw.")
@click.option(
    "--rate",
    default=4e-3,
    type=click.FloatRange(0, 1, min_open=True),
    show_default=True,
    help="Highest learning rate.",
)
@click.option(
    "--hallucination", default=0.5, type=_SHARE, show_default=True, help="Share of captions that name what is absent."
)
@click.option("--omission", default=0.1, type=_SHARE, show_default=True, help="Share of categories left out.")
@click.option(
    "--fitting", default=0.05, type=_SHARE, show_default=True, help="Share of no-questions about what fits the context."
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Go on from the weights and words of this model directory.",
)
@click.option("--workers", default=8, type=click.IntRange(0), show_default=True, help="Text and drawing processes.")
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), show_default=True, help="Where to train.")
@click.option("--small", is_flag=True, help="A toy network and few rows: tries the run on a CPU in a minute.")
def command(
    *,
    out: Path,
    architecture: str,
    seed: int,
    language_steps: int,
    steps: int,
    minutes: float,
    scenes: int,
    rate: float,
    hallucination: float,
    omission: float,
    fitting: float,
    start: Path | None,
    workers: int,
    device: str,
    small: bool,
) -> None:
    """Train an embedded model from scratch on drawn scenes: language alone first, then pictures.

    Writes a directory that transformers loads, and the log `training.log` in it. With the defaults it takes under 15
    minutes on one NVIDIA H200.
    """
    import torch

    from tools.training.loop import Recipe, train
    from tools.training.questions import Diet

    if device == "cuda" and not torch.cuda.is_available():
        raise VlmfixError("--device cuda: torch sees no CUDA device here", hint="use --device cpu --small to try it")
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        architecture=architecture,
        seed=seed,
        language_steps=language_steps,
        steps=steps,
        minutes=minutes,
        pool=scenes,
        rate=rate,
        diet=Diet(hallucination=hallucination, omission=omission, fitting=fitting),
        start=start,
        workers=workers,
        device=device,
        small=small,
    )
    with (out / "training.log").open("w", encoding="utf-8", buffering=1) as file:

        def log(line: str) -> None:
            click.echo(line)
            print(line, file=file)

        log(f"python -m tools.training {shlex.join(sys.argv[1:])}")
        train(out, recipe, log)


if __name__ == "__main__":
    run(command)
