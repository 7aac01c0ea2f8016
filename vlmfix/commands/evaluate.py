"""`vlmfix eval`: benchmarks."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from vlmfix.commands import options
from vlmfix.commands.compare import tell
from vlmfix.errors import UsageError
from vlmfix.extras import need
from vlmfix.files import resolved
from vlmfix.settings import Settings

PATH = click.Path(path_type=Path)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every benchmark's command is told.

    Attributes:
        out: Folder of the run.
        decoders: Specifications of the arms, as typed.
        settings: Model and generation settings; ``max_new_tokens`` 0 stands for the benchmark's own.
        batch_size: Rows at a time; None is automatic.
        retry_failed: Ask failed samples again.
        as_json: Print JSON instead of a table.
    """

    out: Path
    decoders: tuple[str, ...]
    settings: Settings
    batch_size: int | None
    retry_failed: bool
    as_json: bool


def _planned(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every benchmark has, handed over as one ``plan``."""

    @functools.wraps(command)
    def with_plan(
        *,
        settings: Settings,
        out: Path,
        decoders: tuple[str, ...],
        batch_size: int | None,
        retry_failed: bool,
        as_json: bool,
        max_new_tokens: int | None,
        **given: Any,
    ) -> None:
        options.quieten()
        need("eval")  # to score, after the last answer
        settings = replace(settings, max_new_tokens=max_new_tokens or 0)
        plan = Plan(
            out=out,
            decoders=decoders,
            settings=settings,
            batch_size=batch_size,
            retry_failed=retry_failed,
            as_json=as_json,
        )
        command(plan=plan, **given)

    decorated: Callable[..., None] = with_plan
    for option in (
        options.generation_options("decoder", "max_new_tokens"),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            help="Longest answer, in tokens.  [default: the benchmark's]",
        ),
        options.batch_size("Rows at a time."),
        options.retry_failed("OUT/ARM/answers.jsonl"),
        click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON."),
        click.option(
            "--decoder",
            "decoders",
            multiple=True,
            type=options.DecoderSpec(),
            help="An arm beside plain greedy, which always runs; may be repeated. See: vlmfix decoders.",
        ),
        click.option("--out", required=True, type=PATH, help="Folder of the run; goes on where it was."),
    ):
        decorated = option(decorated)
    return decorated


def _sampled(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that choose pictures."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option("--list", "listed", type=PATH, help="File with one picture per line: these, in this order."),
            click.option(
                "--sample-seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the draw."
            ),
            click.option("--count", type=click.IntRange(min=1), help=f"Draw so many {what}.  [default: all]"),
        ):
            command = option(command)
        return command

    return decorate


class _Benchmarks(click.Group):
    """Adds benchmarks of other distributions to the commands, and those in files, ``mine.py:Mine``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from vlmfix.evals.tasks import TASKS

        return [*super().list_commands(ctx), *TASKS.plugins()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        from vlmfix.evals.tasks import TASKS
        from vlmfix.language.grammar import split

        words, *more = split(cmd_name)
        if not ctx.resilient_parsing and (words.name.endswith(".py") or words.name in TASKS.clashes()):
            TASKS.check(words.name)  # it says more than that there is no such command
        if more or words.name in TASKS.homes or words.name not in TASKS:
            return None
        return _other(cmd_name, TASKS.plugins()[words.name].distribution if words.name in TASKS.plugins() else "a file")


@click.group("eval", cls=_Benchmarks)
def evaluate() -> None:
    """Benchmarks: several decoders over the same questions, with intervals.

    One in a file of your own is called path/to/file.py:CLASS.
    """


def _other(spec: str, source: str) -> click.Command:
    """The command of a benchmark that is not vlmfix's own.

    Args:
        spec: Its name or its file and class, with options behind it as a decoder has parameters.
        source: Where it comes from, in words.
    """

    @click.command(spec, short_help=f"From {source}.")
    @click.option("--questions", type=PATH, help="File or folder that the benchmark reads its questions from.")
    @click.option("--images", type=PATH, help="Folder of the pictures.")
    @_planned
    def command(*, questions: Path | None, images: Path | None, plan: Plan) -> None:
        task = benchmark(spec)
        _run(task, task.read(questions=questions, images=images), plan)

    command.help = f"{spec}, a benchmark from {source}."
    return command


def benchmark(spec: str) -> Any:  # noqa: ANN401 (a Benchmark, whose module would import numpy)
    """Makes a benchmark that is not vlmfix's own.

    Raises:
        UsageError: It is not known, or an option of it is not allowed.
        PluginError: It cannot be used.
    """
    from vlmfix.decoders.index import check_parameters
    from vlmfix.evals.tasks import TASKS
    from vlmfix.language.grammar import split
    from vlmfix.language.parameters import ranges

    words, *more = split(spec)
    if more:
        raise UsageError(f"{spec} names several benchmarks", "name one")
    kind = TASKS.find(words.name)
    allowed = ranges(kind)
    check_parameters(words, list(allowed))
    return kind(**{key: allowed[key].parse(words.name, key, text) for key, _, text in words.given})


@evaluate.command()
@click.option("--questions", type=PATH, help="Official question file, or a folder of them.")
@click.option("--instances", type=PATH, multiple=True, help="Build questions from COCO instances instead.")
@click.option("--images", required=True, type=PATH, help="Folder of the pictures.")
@click.option("--sample-seed", type=click.IntRange(0), help="Of the questions built from --instances.  [default: 0]")
@click.option("--suffix", help="Put behind each question.  [default: newline, Answer the question using a single ...]")
@click.option("--parser", default="official", show_default=True, metavar="NAME", help="Who reads the answers.")
@_planned
def pope(
    *,
    questions: Path | None,
    instances: tuple[Path, ...],
    images: Path,
    sample_seed: int | None,
    suffix: str | None,
    parser: str,
    plan: Plan,
) -> None:
    """POPE: is there a dog in the image?

    Reads question files of every generation, or builds questions from COCO instances by the official rule.
    """
    if (questions is None) == (not instances):
        raise UsageError("give either --questions or --instances", "question files as published, or COCO instances")
    if questions is not None and sample_seed is not None:
        raise UsageError("--sample-seed does not go with --questions", "the questions of a file are asked as they are")
    from vlmfix.display import reading
    from vlmfix.evals.benchmarks import coco
    from vlmfix.evals.benchmarks import pope as benchmark

    suffix = benchmark.SUFFIX if suffix is None else suffix
    task = benchmark.Pope(parser=parser)
    if questions is not None:
        workload = benchmark.read(questions, images, suffix=suffix)
    else:
        with reading("annotations") as report:
            pictures = coco.picture_objects(instances, progress=report)
            workload = benchmark.build(pictures, images, seed=sample_seed or 0, suffix=suffix)
    _run(task, workload, plan)


@evaluate.command()
@click.option("--instances", required=True, type=PATH, multiple=True, help="COCO instances; may be repeated.")
@click.option("--captions", required=True, type=PATH, multiple=True, help="COCO captions; may be repeated.")
@click.option("--images", required=True, type=PATH, help="Folder of the pictures.")
@click.option("--protocol", default="chair-512", show_default=True, help="chair-512 or chair-64-trim.")
@click.option(
    "--synonyms", type=PATH, help="Word table in the format of the original synonyms.txt.  [default: our own]"
)
@click.option("--prompt", help="Asked about every picture.  [default: the protocol's]")
@_sampled("pictures")
@_planned
def chair(
    *,
    instances: tuple[Path, ...],
    captions: tuple[Path, ...],
    images: Path,
    protocol: str,
    synonyms: Path | None,
    prompt: str | None,
    count: int | None,
    sample_seed: int,
    listed: Path | None,
    plan: Plan,
) -> None:
    """CHAIR: objects in captions that are not in the picture."""
    from vlmfix.display import reading
    from vlmfix.evals.benchmarks import chair as benchmark
    from vlmfix.evals.benchmarks.words import read_synonyms

    table = None if synonyms is None else read_synonyms(synonyms)
    with reading("annotations") as report:
        workload = benchmark.read(
            instances,
            captions,
            images,
            protocol=protocol,
            prompt=prompt,
            count=count,
            seed=sample_seed,
            listed=listed,
            synonyms=table,
            progress=report,
        )
    rules = benchmark.PROTOCOLS[protocol]
    _run(benchmark.Chair(synonyms=table, trim=rules.trim), workload, plan, rules.max_new_tokens)


@evaluate.command()
@click.option("--questions", required=True, type=PATH, help="Folder of the benchmark: query files and annotations.")
@click.option("--images", required=True, type=PATH, help="Folder of the pictures.")
@click.option(
    "--part",
    default="all",
    show_default=True,
    type=click.Choice(["all", "generative", "discriminative"]),
    help="Which.",
)
@click.option("--suffix", default="", help="Put behind each yes/no question.")
@click.option(
    "--parser", default="exact", show_default=True, metavar="NAME", help="Who reads yes and no; exact: officially."
)
@_planned
def amber(*, questions: Path, images: Path, part: str, suffix: str, parser: str, plan: Plan) -> None:
    """AMBER: descriptions, and yes/no about existence, attributes and relations."""
    from vlmfix.evals.benchmarks import amber as benchmark

    _run(benchmark.rules(questions, parser=parser), benchmark.read(questions, images, part=part, suffix=suffix), plan)


@evaluate.command()
@click.option("--questions", required=True, type=PATH, help="Folder of the benchmark, one folder or file per task.")
@click.option("--images", type=PATH, help="Folder of the tasks' pictures.  [default: the same]")
@_planned
def mme(*, questions: Path, images: Path | None, plan: Plan) -> None:
    """MME: two yes/no questions a picture; the hallucination subset and whatever other tasks are there."""
    from vlmfix.evals.benchmarks import mme as benchmark

    _run(benchmark.Mme(), benchmark.read(questions, images), plan)


@evaluate.command()
@click.option("--questions", required=True, type=PATH, help="HallusionBench.json.")
@click.option("--images", required=True, type=PATH, help="Folder of the pictures.")
@_planned
def hallusion(*, questions: Path, images: Path, plan: Plan) -> None:
    """HallusionBench, judged by the yes or no in the answer.

    Judgements made elsewhere come in afterwards: vlmfix eval score DIR --judgements FILE.
    """
    from vlmfix.evals.benchmarks import hallusion as benchmark

    _run(benchmark.Hallusion(), benchmark.read(questions, images), plan)


@evaluate.command()
@click.option("--images", required=True, type=PATH, help="Any folder of pictures.")
@click.option("--captions", type=PATH, help="COCO captions, for RefCLIPScore.")
@click.option(
    "--clip",
    default="ViT-B-32-quickgelu",
    show_default=True,
    help="Model of open_clip, hf-hub:OWNER/NAME or local-dir:FOLDER.",
)
@click.option("--clip-weights", default="openai", show_default=True, help="Tag of open_clip, or a file.")
@click.option("--prompt", help="Asked about every picture.  [default: Please describe this image in one sentence.]")
@_sampled("pictures")
@_planned
def clipscore(
    *,
    images: Path,
    captions: Path | None,
    clip: str,
    clip_weights: str,
    prompt: str | None,
    count: int | None,
    sample_seed: int,
    listed: Path | None,
    plan: Plan,
) -> None:
    """CLIPScore of captions, for pictures without annotations."""
    from vlmfix.evals.benchmarks import clipscore as benchmark

    task = benchmark.ClipScore(images=str(resolved(images)), model=clip, pretrained=clip_weights)
    workload = benchmark.read(
        images,
        captions=captions,
        count=count,
        seed=sample_seed,
        listed=listed,
        prompt=benchmark.PROMPT if prompt is None else prompt,
        skip=plan.out,
    )
    options.say(f"vlmfix: loading CLIP {clip}", err=True)
    task.load()  # what is wrong with it is said now, not after the last answer
    _run(task, workload, plan)


def _run(task: Any, workload: Any, plan: Plan, longest: int | None = None) -> None:  # noqa: ANN401 (their types would import numpy)
    """Asks, scores, compares and shows."""
    from vlmfix.display import counting, loading
    from vlmfix.evals.score import score as score_run
    from vlmfix.jobs.benchmark.job import evaluate as ask

    arms = _arms(plan.decoders)
    settings = replace(plan.settings, max_new_tokens=plan.settings.max_new_tokens or longest or task.max_new_tokens)
    with options.stoppable(plan.out), counting("answers") as report:
        run = ask(
            plan.out,
            task,
            workload,
            settings,
            arms,
            batch_size=plan.batch_size,
            retry_failed=plan.retry_failed,
            command=shlex.join(["vlmfix", *sys.argv[1:]]),
            report=report,
            loader=loading,
        )
    for arm, records in run.answers.items():
        if failed := [record for record in records.values() if record.failed]:
            first = f"{failed[0].id}: {failed[0].failed}"
            options.say(f"vlmfix: {arm}: {len(failed)} of {len(records)} samples failed; the first, {first}", err=True)
    tell([score_run(run)], plan.out, as_json=plan.as_json)
    if run.in_vain:
        click.get_current_context().exit(1)


def _arms(specs: tuple[str, ...]) -> dict[str, Any]:
    """Decoders by what they are called in tables: as typed, and a recipe in a file by its own and its folder's name."""
    from vlmfix.decoders import DECODERS, parse
    from vlmfix.evals.record import PLAIN
    from vlmfix.language.recipe import SHIPPED, recipe_file

    arms: dict[str, Any] = {}
    for spec in specs:
        decoder = parse(spec)
        if isinstance(decoder, DECODERS[PLAIN]):
            name = PLAIN
        elif spec.startswith("@") and "+" not in spec:
            file = resolved(recipe_file(spec[1:]))
            name = spec if file in SHIPPED.values() else f"{file.parent.name}/{file.stem}"
        else:
            name = spec
        if name in arms or decoder in arms.values():
            raise UsageError(f"--decoder {spec} is given twice", "give each arm once")
        arms[name] = decoder
    return arms
