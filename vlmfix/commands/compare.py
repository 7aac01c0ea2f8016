"""`vlmfix compare`, `vlmfix reproduce` and `vlmfix eval score`: what may be said of answers that are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vlmfix.commands import options
from vlmfix.errors import UsageError
from vlmfix.files import resolved

PATH = click.Path(path_type=Path)
RULES = {"parser": ("pope", "amber"), "questions": ("pope",), "synonyms": ("chair",), "judgements": ("hallusion",)}
"""Which benchmarks have rules that can be changed afterwards."""


@click.command()
@click.argument("folder", type=PATH)
@click.option("--parser", help="POPE, AMBER: read the answers with another published parser.")
@click.option(
    "--questions", type=PATH, help="POPE: the same questions with other truths, such as RePOPE's; with --out."
)
@click.option("--out", type=PATH, help="With --questions: folder for a run of them; FOLDER stays as it is.")
@click.option("--synonyms", type=PATH, help="CHAIR: word table in the format of the original synonyms.txt.")
@click.option("--judgements", type=PATH, multiple=True, help="HallusionBench: judgements made elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@options.debug
def score(
    *,
    folder: Path,
    parser: str | None,
    questions: Path | None,
    out: Path | None,
    synonyms: Path | None,
    judgements: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Score the answers in FOLDER again, without the model that gave them."""
    options.quieten()
    from vlmfix.evals.record import read_run
    from vlmfix.evals.score import score as score_run

    run = read_run(folder)
    for name, given in zip(RULES, (parser, questions, synonyms, judgements), strict=True):
        if given and run.task.name not in RULES[name]:
            raise UsageError(f"--{name} does not go with {run.task.name}", f"{folder} is a run of {run.task.name}")
    if (questions is None) is not (out is None):
        raise UsageError("--questions and --out go together", "other truths make another run, with a folder of its own")
    if questions is not None and out is not None:
        from vlmfix.evals.benchmarks import pope
        from vlmfix.evals.score import answered_before

        workload = pope.read(questions, Path(run.card["images"]), suffix=run.card["data"]["suffix"])
        run, folder = answered_before(run, workload, out), out
    samples, changed = None, dict[str, Any]()
    if parser is not None:
        changed = {"parser": parser}
    if synonyms is not None:
        from vlmfix.evals.benchmarks.words import read_synonyms

        changed = {"synonyms": read_synonyms(synonyms)}
    if judgements:
        from vlmfix.evals.benchmarks.hallusion import judged_before

        samples, changed = judged_before(run.samples, judgements), {"judged_by": "file"}
    tell([score_run(run, samples=samples, **changed)], folder, as_json=as_json)


@click.command()
@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="Where comparison.csv, .md and .png go.  [default: the first folder]")
@click.option(
    "--save",
    "files",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Also: tables in LaTeX (.tex), a page (.html), the plot (.svg, .pdf, .png); may be given several times.",
)
@click.option("--seeds", is_flag=True, help="FOLDERS differ in --seed alone: mean and standard deviation over them.")
@click.option("--draws", default=10_000, show_default=True, type=click.IntRange(min=1000), help="Bootstrap draws.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the draws.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def compare(
    *,
    folders: tuple[Path, ...],
    out: Path | None,
    files: tuple[Path, ...],
    seeds: bool,
    draws: int,
    seed: int,
    as_json: bool,
) -> None:
    """Compare the arms of evaluation FOLDERS with plain decoding, by paired intervals.

    Runs whose questions, model, prompt or decoding differ are refused. Of FOLDERS that vlmfix run wrote, which have no
    truth, it says what changed: how many answers, their lengths and the objects that they name.
    """
    options.quieten()
    if any(os.path.exists(folder / "run.json") for folder in folders):
        _tell_changes(folders, as_json=as_json)
        return
    from vlmfix.evals.record import read_run

    runs = [read_run(folder) for folder in folders]
    if seeds:
        _tell_seeds(runs, files, as_json=as_json)
        return
    if all(len(run.answers) == 1 for run in runs):
        listed = " and ".join(str(run.folder) for run in runs)
        raise UsageError(f"there is only the plain arm in {listed}", "add arms: vlmfix eval ... --decoder SPEC")
    from vlmfix.reports.files import check_path

    for file in files:
        check_path(file)
    tell(runs, out or folders[0], as_json=as_json, files=files, draws=draws, seed=seed)


def _tell_seeds(runs: list[Any], files: tuple[Path, ...], *, as_json: bool) -> None:
    from vlmfix.evals.comparison.seeds import over_seeds
    from vlmfix.reports.files import check_path, save_report
    from vlmfix.reports.pages import report_table, seeds_json, seeds_report
    from vlmfix.terminal import rendered

    for name in ("out", "draws", "seed"):
        if click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UsageError(f"--{name} does not go with --seeds", "there are neither files of a comparison nor tests")
    for file in files:
        check_path(file)
    found = over_seeds(runs)
    report = seeds_report(found)
    for file in files:
        save_report(report, file)
    if as_json:
        options.say_json(seeds_json(found))
    else:
        click.echo(rendered(*report_table(report)), nl=False)


def _tell_changes(folders: tuple[Path, ...], *, as_json: bool) -> None:
    if evaluated := [folder for folder in folders if not os.path.exists(folder / "run.json")]:
        raise UsageError(
            f"{evaluated[0]} is no folder of vlmfix run, as others are",
            "compare folders of one kind; vlmfix view mixes",
        )
    context = click.get_current_context()
    for name in ("out", "files", "seeds", "draws", "seed"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "save" if name == "files" else name
            raise UsageError(f"--{option} does not go with folders of vlmfix run", "it is about evaluations alone")
    from vlmfix.reports.changes import changes_json, changes_table
    from vlmfix.terminal import rendered
    from vlmfix.view.changes import changes
    from vlmfix.view.folders import read_sheet

    sheet = read_sheet(folders)
    for note in sheet.notes:
        options.say(f"vlmfix: {note}", err=True)
    found = changes(sheet)
    if as_json:
        options.say_json(changes_json(found))
    else:
        click.echo(rendered(*changes_table(found)), nl=False)


@click.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="Folder of the second run.  [default: FOLDER/again]")
@click.option("--images", type=PATH, help="Folder of the pictures.  [default: where they were]")
@click.option("--model", help="Directory of the model.  [default: where it was]")
@click.option("--prompts", type=PATH, help="File of the prompts, of what vlmfix run wrote.  [default: where it was]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def reproduce(
    *,
    folder: Path,
    out: Path | None,
    images: Path | None,
    model: str | None,
    prompts: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Run what is in FOLDER again from its card, and say what differs: an evaluation, or what vlmfix run wrote.

    Pictures, weights and prompts must be those of the run; its digests tell, wherever they lie now. The exit code is 0
    when every answer is the same, of an evaluation in every token, else 1.
    """
    options.quieten()
    if os.path.exists(folder / "run.json"):
        _answer_again(
            folder, out or folder / "again", as_json, images=images, model=model, prompts=prompts, device=device
        )
        return
    if prompts is not None:
        raise UsageError(f"{folder} is an evaluation, which keeps its questions itself", "leave --prompts out")
    from vlmfix.display import counting, loading
    from vlmfix.evals.record import read_run
    from vlmfix.evals.score import score as score_run
    from vlmfix.jobs.benchmark.reproduce import reproduce as again
    from vlmfix.reports.reproduction import reproduction_json, reproduction_text

    run, second = read_run(folder), out or folder / "again"
    if resolved(second) == resolved(folder):
        raise UsageError(f"--out {second} is the run itself", "choose another folder for the second run")
    asked = False

    def load(*model: Any, **how: Any) -> Any:  # noqa: ANN401 (its type would import torch)
        nonlocal asked
        asked = True
        return loading(*model, **how)

    with counting("answers") as report:
        found = again(run, second, images=images, model=model, device=device, report=report, loader=load)
    if not asked:
        options.say(f"vlmfix: {second} was complete before; remove it to run once more", err=True)
    score_run(found.run)
    if as_json:
        options.say_json(reproduction_json(found))
    else:
        options.say(reproduction_text(found, folder), nl=False, lines=True)
    if not found.exact:
        click.get_current_context().exit(1)


def _answer_again(folder: Path, out: Path, as_json: bool, **where: Any) -> None:
    from vlmfix.display import loading, run_display
    from vlmfix.jobs.folder.reproduce import reproduce as again

    with run_display() as report:
        found = again(folder, out, **where, report=report, loader=loading)
    same = found.answers - len(found.other)
    if as_json:
        about = {"exact": not found.other, "answers": found.answers, "other": found.other, "facts": found.facts}
        options.say_json(about)
    else:
        options.say(f"{folder}: {same} of {found.answers} answers are the same; the second run is in {out}")
        for image, prompt in found.other[:5]:
            options.say(f"  differs: {image}: {prompt}")
        for name, (before, now) in found.facts.items():
            options.say(f"  {name} changed: {before or 'none'} -> {now or 'none'}")
    if found.other:
        click.get_current_context().exit(1)


def tell(
    runs: list[Any],
    out: Path,
    *,
    as_json: bool,
    files: tuple[Path, ...] = (),
    draws: int = 10_000,
    seed: int = 0,
) -> None:
    """Compares runs, writes the comparison's files and prints it."""
    from vlmfix.evals.comparison.compare import compare as compare_runs
    from vlmfix.reports import tables
    from vlmfix.reports.files import save, save_as
    from vlmfix.terminal import rendered

    comparison = compare_runs(runs, draws=draws, seed=seed)
    written = save(comparison, out)
    for file in files:
        save_as(comparison, file)
    if as_json:
        options.say(tables.json_text(comparison), lines=True)
    else:
        click.echo(rendered(tables.terminal(comparison)), nl=False)
    options.say(f"vlmfix: the same in {', '.join(map(str, (*written, *files)))}", err=True)
