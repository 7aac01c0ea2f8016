"""`vlmfix tune`: a decoder's parameters, searched on one half of the pictures and reported on the other."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vlmfix.commands import options
from vlmfix.commands.evaluate import benchmark
from vlmfix.errors import UsageError
from vlmfix.extras import need
from vlmfix.settings import Settings

PATH = click.Path(path_type=Path)
NEEDED = {"pope": ("questions",), "chair": ("instances", "captions")}


@click.command()
@click.argument("spec", type=options.DecoderSpec(), metavar="SPEC")
@click.option(
    "--task", required=True, metavar="NAME", help="What to tune for: pope, chair, or a benchmark of your own."
)
@click.option("--budget", default=20, show_default=True, type=click.IntRange(min=1), help="Number of trials.")
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Search up to N heads, one by one, for a decoder that takes heads; not its numbers, and without --budget.",
)
@click.option("--profile", type=PATH, help="--heads: profiles that say which heads to try.  [default: the model's own]")
@click.option("--profiler", help="--heads: which of its profiles.  [default: the first]")
@click.option(
    "--candidates", default=16, show_default=True, type=click.IntRange(min=1), help="--heads: how many heads to try."
)
@click.option("--out", required=True, type=PATH, help="Folder of the search; goes on where it was.")
@click.option("--images", required=True, type=PATH, help="Folder of the pictures.")
@click.option("--questions", type=PATH, help="pope: question file, or a folder of them; others: what they read.")
@click.option("--instances", type=PATH, multiple=True, help="chair: COCO instances.")
@click.option("--captions", type=PATH, multiple=True, help="chair: COCO captions.")
@click.option("--count", type=click.IntRange(min=2), help="chair: draw so many pictures.  [default: all]")
@click.option("--sample-seed", default=0, show_default=True, type=click.IntRange(0), help="Of draw, split and search.")
@click.option("--max-recall-loss", default=0.02, show_default=True, help="What recall may lose against plain decoding.")
@click.option("--max-length-loss", default=0.1, show_default=True, help="Share of its length that an answer may lose.")
@options.batch_size("Rows at once.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer.  [default: the benchmark's]")
@options.generation_options("decoder", "max_new_tokens")
def tune(
    *,
    spec: str,
    task: str,
    budget: int,
    heads: int | None,
    profile: Path | None,
    profiler: str | None,
    candidates: int,
    out: Path,
    images: Path,
    questions: Path | None,
    instances: tuple[Path, ...],
    captions: tuple[Path, ...],
    count: int | None,
    sample_seed: int,
    max_recall_loss: float,
    max_length_loss: float,
    batch_size: int | None,
    max_new_tokens: int | None,
    settings: Settings,
) -> None:
    """Search the parameters that SPEC leaves open on half of the pictures, and report the best on the other half.

    Writes OUT/recipe.toml, which every --decoder takes as @OUT/recipe.toml, and OUT/pareto.png. Parameters that SPEC
    gives stay fixed: vcd:plausibility=0.1,noise_step=500 searches contrast alone. With --heads N its heads are chosen
    instead, one by one: of the strongest heads of a profile each time the one that helps most beside those before.
    """
    given = click.get_current_context().get_parameter_source
    own = [name for name in ("profile", "profiler", "candidates") if given(name) is not ParameterSource.DEFAULT]
    if heads is None and own:
        raise UsageError(f"--{own[0]} says which heads to try", "give --heads N, too")
    if heads is not None and given("budget") is not ParameterSource.DEFAULT:
        raise UsageError("--budget and --heads are both given", "a hunt tries each of --candidates in each round")
    _check(task, {"questions": questions, "instances": instances, "captions": captions}, count)
    need("tune")
    need("eval")
    options.quieten()
    from vlmfix.evals.tuning import tune as tuning

    if task not in NEEDED:
        rules = benchmark(task)
        workload = rules.read(questions=questions, images=images)
    elif questions is not None:
        rules, workload = _pope(questions, images)
    else:
        rules, workload = _chair(instances, captions, images, count, sample_seed)
    settings = replace(settings, max_new_tokens=max_new_tokens or rules.max_new_tokens)
    guards = tuning.Guards(max_recall_loss=max_recall_loss, max_length_loss=max_length_loss)
    loader = _once()
    how: dict[str, Any] = {
        "out": out,
        "evaluate": _evaluator(rules, settings, batch_size, loader),
        "seed": sample_seed,
        "guards": guards,
    }
    if heads is None:
        found = tuning.tune(spec, workload, rules, settings, budget=budget, **how)
    else:
        from vlmfix.evals.tuning.hunt import Hunted, hunt

        Hunted.of(spec)  # what is wrong with it is said before the model is loaded
        vlm = loader(settings.model, **settings.loading())
        tried, ranking = _strongest(vlm, profile, profiler, candidates)
        found = hunt(spec, workload, rules, settings, heads=heads, candidates=tried, ranking=ranking, **how)
    _show(found, out, guards)
    if found.recipe is None:
        click.get_current_context().exit(1)


def _check(task: str, given: Mapping[str, object], count: int | None) -> None:
    """Checks that a benchmark is known, and gets what it needs and nothing else; of one's own, it says that itself."""
    if task not in NEEDED:
        from vlmfix.evals.tasks import TASKS
        from vlmfix.language.grammar import split

        name = next(split(task)).name
        if name in TASKS.homes:
            raise UsageError(f"{task} cannot be tuned for", f"tune for {' or '.join(NEEDED)}")
        TASKS.check(name)
    needed = NEEDED.get(task, ("questions",))
    for name, value in given.items():
        if (value and name not in needed) or (not value and name in NEEDED.get(task, ())):
            need = " and ".join(f"--{option}" for option in needed)
            raise UsageError(f"--task {task} {'needs' if not value else 'does not take'} --{name}", f"give {need}")
    if count is not None and task != "chair":
        raise UsageError(f"--task {task} does not take --count", "all questions of its files are asked")


def _pope(questions: Path, images: Path) -> tuple[Any, Any]:
    from vlmfix.evals.benchmarks import pope

    return pope.Pope(), pope.read(questions, images)


def _chair(
    instances: tuple[Path, ...], captions: tuple[Path, ...], images: Path, count: int | None, seed: int
) -> tuple[Any, Any]:
    from vlmfix.display import reading
    from vlmfix.evals.benchmarks import chair

    with reading("annotations") as report:
        return chair.Chair(), chair.read(instances, captions, images, count=count, seed=seed, progress=report)


def _strongest(vlm: Any, file: Path | None, profiler: str | None, count: int) -> tuple[list[Any], dict[str, str]]:  # noqa: ANN401
    """The heads of a profile with the largest scores, whatever their sign, and what the profile is."""
    from vlmfix.decoders.attention.profiled import profile_facts, profile_file, profile_for
    from vlmfix.heads.profile import load_profiles

    name = None if file is None else str(file)
    path = profile_file(vlm, name)
    if path is None:
        raise UsageError(f"{vlm.name} has no profile of heads", "measure one: vlmfix profile, and give --profile FILE")
    chosen = profiler or next(iter(load_profiles(path)))
    found = profile_for(vlm, "tune --heads", chosen, str(path))
    if found is None:
        raise UsageError(f"{path} holds no profile {chosen}", "give another --profiler")
    order = found.scores.abs().flatten().sort(descending=True, stable=True).indices[:count].tolist()
    return [divmod(place, found.scores.shape[1]) for place in order], profile_facts(vlm, "tune", chosen, str(path))


def _once() -> Any:  # noqa: ANN401
    """Loads the model when it is first needed, and only then."""
    from vlmfix.display import loading

    loaded: list[Any] = []

    def loader(*model: str, **how: Any) -> Any:  # noqa: ANN401
        if not loaded:
            loaded.append(loading(*model, **how))
        return loaded[0]

    return loader


def _evaluator(task: Any, settings: Settings, batch_size: int | None, loader: Any) -> Any:  # noqa: ANN401 (their types import numpy)
    """Runs arms with one model; a line on stderr for each."""
    from vlmfix.jobs.benchmark.job import evaluate

    def run(arms: Any, workload: Any, folder: Path) -> Any:  # noqa: ANN401
        *_, newest = arms
        options.say(f"vlmfix: {folder.name}: {newest}", err=True)
        return evaluate(
            folder,
            task,
            workload,
            settings,
            arms,
            batch_size=batch_size,
            command=shlex.join(["vlmfix", *sys.argv[1:]]),
            loader=loader,
        )

    return run


def _show(found: Any, out: Path, guards: Any) -> None:  # noqa: ANN401
    """Prints what tuning found, with the held-out comparison, and draws the trials."""
    from vlmfix.reports import tables
    from vlmfix.terminal import rendered

    drawn = _draw(found, out, guards)
    if found.held_out is not None:
        click.echo(rendered(tables.terminal(found.held_out)), nl=False)
    options.say(found.verdict)
    if found.recipe:
        written = f"{found.recipe} and pareto.png" if drawn else str(found.recipe)
    else:
        written = f"no recipe; the trials are in {out / drawn if drawn else out}"
    options.say(f"vlmfix: {written}", err=True)


def _draw(found: Any, out: Path, guards: Any) -> str:  # noqa: ANN401
    """Draws the trials against the guard that the benchmark has; without one there is no drawing, and no name."""
    from vlmfix.reports import plots

    plain = found.plain
    if plain.recall is not None:
        guard, limit = "recall", plain.recall - guards.max_recall_loss
    elif plain.length is not None:
        guard, limit = "length", plain.length * (1 - guards.max_length_loss)
    else:
        return ""
    points = [plots.Point(getattr(plain, guard), plain.value, role="plain", name="greedy")]
    points += [
        plots.Point(
            getattr(trial.outcome, guard),
            trial.outcome.value,
            trial.feasible,
            *(("chosen", trial.spec) if trial.chosen else ()),
        )
        for trial in found.trials
        if trial.outcome.value is not None and getattr(trial.outcome, guard) is not None
    ]
    plots.pareto(
        points,
        out / "pareto.png",
        objective=found.objective,
        guard=guard,
        objective_better=found.better,
        limit=limit,
        title=f"{len(found.trials)} trials on the tuning split",
    )
    return "pareto.png"
