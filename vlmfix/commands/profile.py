"""`vlmfix profile`: measure a model's heads, or directions in its streams, show them, and compare two profiles."""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError
from vlmfix.parsing import escaped
from vlmfix.settings import Settings

PATH = click.Path(path_type=Path)


@click.group(invoke_without_command=True)
@click.option(
    "--profiler",
    "names",
    type=options.ProfilerNames(),
    help="What to measure, for instance vhd,image-mass; FILE.py:CLASS for one of your own.",
)
@click.option(
    "--directions",
    "methods",
    type=options.MethodNames(),
    help="Measure the directions that these methods read, for instance vti,pti, in place of heads.",
)
@click.option("--images", type=PATH, help="Folder of pictures, drawn from in random order.")
@click.option("--out", type=PATH, help="File for the profiles, such as heads.safetensors.")
@click.option("--count", type=click.IntRange(min=1), help="Show at most so many pictures.  [default: all]")
@click.option("--prompt", help="Asked about every picture.  [default: Please describe this image in detail.]")
@click.option("--batch-size", default=4, show_default=True, type=click.IntRange(min=1), help="Pictures at a time.")
@click.option("--plot", type=PATH, help="Draw the profiles: PNG, PDF or SVG.")
@click.option(
    "--instances",
    type=PATH,
    multiple=True,
    help="COCO instances: ablation then measures captions; for --directions. May be repeated.",
)
@click.option("--captions", type=PATH, multiple=True, help="COCO captions, with --instances. May be repeated.")
@click.option("--add", is_flag=True, help="Keep what else --out holds, profiles of the same model.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the pictures' order and of prompts."
)
@options.generation_options("decoder", "max_new_tokens", "num_beams", "temperature", "seed", *options.CHOSEN)
@click.pass_context
def profile(
    context: click.Context,
    *,
    names: list[str] | None,
    methods: list[str] | None,
    images: Path | None,
    out: Path | None,
    count: int | None,
    prompt: str | None,
    batch_size: int,
    plot: Path | None,
    instances: tuple[Path, ...],
    captions: tuple[Path, ...],
    add: bool,
    seed: int,
    settings: Settings,
) -> None:
    """Measure what each attention head does, on a folder of pictures.

    All profilers share their passes. It ends before all pictures are shown when the rankings of the heads are stable:
    looked at after every 32 pictures, each would agree with that of as many others to 0.99 (Spearman), twice in a row.

    With --instances and --captions, the profiler ablation lets the model describe the pictures and measures which heads
    push hallucinated words more than real ones, as CHAIR tells them apart; pictures without annotations are left out.

    With --directions it measures directions in streams and KV cache, which need both, into a file of their own.
    """
    if context.invoked_subcommand is not None:
        return
    if (names is None and methods is None) or images is None or out is None:
        raise UsageError("--profiler, --images and --out are needed", "or use: vlmfix profile show FILE, diff A B")
    if not os.path.isdir(out.parent):
        raise UsageError(f"there is no folder {out.parent}", "make it, or write elsewhere")
    options.quieten()
    if methods is not None:
        if names is not None or plot is not None:
            raise UsageError(
                "--directions measures no heads, which --profiler and --plot are about",
                "give them in a run of their own",
            )
        asked = {"seed": seed} | ({} if prompt is None else {"question": prompt})
        _directions(methods, images, instances, captions, out, count, settings, add=add, **asked)
        return
    if names is None:
        raise UsageError("--profiler is missing", "name what to measure")
    from vlmfix.display import counting, loading
    from vlmfix.heads.measure import QUESTION
    from vlmfix.heads.measure import profile as measure
    from vlmfix.heads.profile import load_profiles, refuse_foreign, save_profiles
    from vlmfix.heads.profilers import profilers_of

    refuse_foreign(out)
    if plot is not None:
        from vlmfix.figures import check_target

        check_target(plot)
    chosen = profilers_of(names)
    files = _shuffled(images, seed)
    shown: list[str] = []
    if instances or captions:
        files = _annotated(files, chosen, shown, instances, captions)
    total = len(files) if count is None else min(count, len(files))
    kept = load_profiles(out) if add and os.path.exists(out) else {}
    vlm = loading(settings.model, **settings.loading())
    for held in kept.values():
        held.check(vlm)
    with counting("pictures") as report, closing(_opened(files, shown)) as pictures:
        found = measure(
            vlm,
            islice(pictures, count),
            chosen,
            question=QUESTION if prompt is None else prompt,
            batch_size=batch_size,
            seed=seed,
            report=lambda done: report(done, total),
        )
    save_profiles({**kept, **found}, out)
    if plot is not None:
        from vlmfix.heads.plot import draw

        draw(list(found.values()), plot)
    _show(found, 10)
    options.say(f"vlmfix: profiles in {out}" + (f", drawn in {plot}" if plot else ""), err=True)


@profile.command()
@click.argument("file", type=PATH)
@click.option("--profiler", "name", help="Only this one.")
@click.option("--count", default=20, show_default=True, type=click.IntRange(min=1), help="How many heads.")
@click.option("--page", type=PATH, help="Also write an HTML page, with maps of all heads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def show(*, file: Path, name: str | None, count: int, page: Path | None, as_json: bool) -> None:
    """Show where the profiles in FILE come from, and their strongest heads; of directions, where they come from."""
    options.quieten()
    from vlmfix.heads.profile import HeadProfile, load_profiles

    if page is not None:
        from vlmfix.reports.pages import PROFILES
        from vlmfix.view.page import refuse_foreign

        refuse_foreign(page, PROFILES)
    if page is None and _holds_directions(file):
        _shown_directions(file, name, as_json=as_json)
        return
    found = load_profiles(file) if name is None else {name: HeadProfile.load(file, name)}
    if as_json:
        options.say_json({key: _json(part, count) for key, part in found.items()})
    else:
        _show(found, count)
    if page is not None:
        from vlmfix.reports.pages import profiles_report
        from vlmfix.view.page import write_page

        write_page(page, profiles_report(found, count).page(), PROFILES)
        options.say(f"vlmfix: the same, with maps of all heads: {page}", err=True)


@profile.command()
@click.argument("left", type=PATH)
@click.argument("right", type=PATH)
@click.option("--profiler", "name", help="Only this one.  [default: all that both files hold]")
@click.option("--count", default=20, show_default=True, type=click.IntRange(min=1), help="Strongest heads to compare.")
@click.option("--either-sign", is_flag=True, help="Strongest whatever the sign: of patching, heads of the circuit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.debug
def diff(*, left: Path, right: Path, name: str | None, count: int, either_sign: bool, as_json: bool) -> None:
    """Say how far the profiles in two files agree: their strongest heads, and the ranks of all heads.

    Of two files that were measured with different questions: how many of the heads that carry one task carry the
    other, against chance, and which these are.
    """
    options.quieten()
    from vlmfix.heads.agreement import agreement
    from vlmfix.heads.profile import load_profiles

    first, second = load_profiles(left), load_profiles(right)
    both = [key for key in first if key in second and name in (None, key)]
    if not both:
        held = f"{left} holds {', '.join(first)}; {right} holds {', '.join(second)}"
        raise UsageError(f"there is no {name or 'common'} profile in both files", held)
    found = {key: agreement(first[key], second[key], count=count, either_sign=either_sign) for key in both}
    if as_json:
        options.say_json({key: asdict(part) for key, part in found.items()})
        return
    from rich.table import Table

    from vlmfix.terminal import rendered

    table = Table(box=None, pad_edge=False)
    for title in ("profiler", "heads compared", "in both", "by chance", "p", "rank correlation"):
        table.add_column(title, justify="left" if title == "profiler" else "right")
    for key, part in found.items():
        correlation = "-" if part.correlation is None else f"{part.correlation:.3f}"
        shares = (f"{part.overlap:.3f}", f"{part.chance:.3f}", f"{part.p:.2g}")
        table.add_row(escaped(key), str(part.count), *shares, correlation)
    click.echo(rendered(table), nl=False)
    for key, part in found.items():
        heads = "/".join(f"L{layer}H{head}" for layer, head in part.shared)
        options.say(f"{key}, heads in both: {heads or 'none'}")


def _directions(
    methods: list[str],
    images: Path,
    instances: tuple[Path, ...],
    captions: tuple[Path, ...],
    out: Path,
    count: int | None,
    settings: Settings,
    *,
    add: bool,
    **asked: Any,
) -> None:
    """Measures directions, and writes and shows them; ``asked`` has the question, where one is given, and the seed."""
    from vlmfix.display import counting, loading, reading
    from vlmfix.evals.benchmarks.coco import read_annotations, read_outlines
    from vlmfix.evals.planting import Planting
    from vlmfix.heads.directions.kept import FORMAT, load_directions, save_directions
    from vlmfix.heads.directions.measure import directions, measurements_of
    from vlmfix.heads.profile import refuse_foreign

    refuse_foreign(out, FORMAT)
    chosen = measurements_of(methods)
    if not (instances and captions):
        raise UsageError("directions are measured on annotated pictures", "give --instances and --captions of them")
    with reading("annotations") as report:
        annotations = read_annotations(instances, captions, progress=report)
    known = {picture.file: picture for picture in annotations.pictures.values() if picture.captions}
    files = _known(_shuffled(images, asked["seed"]), known)
    outlines = None
    if any(measurement.needs_mask for measurement in chosen):
        outlines = read_outlines(instances, {known[file.name].id for file in files})
    planting = Planting(annotations, outlines, seed=asked["seed"])
    shown: list[str] = []
    total = len(files) if count is None else min(count, len(files))
    kept = load_directions(out) if add and os.path.exists(out) else {}
    vlm = loading(settings.model, **settings.loading())
    for held in kept.values():
        held.check(vlm)
    with counting("pictures") as report, closing(_opened(files, shown)) as pictures:
        every = (planting.shown(known[shown[number]], picture) for number, picture in enumerate(pictures))
        found = directions(
            vlm,
            islice((one for one in every if one is not None), count),
            chosen,
            about=annotations.sources,
            report=lambda done: report(done, total),
            **asked,
        )
    save_directions({**kept, **found}, out)
    _show_directions(found)
    options.say(f"vlmfix: directions in {out}", err=True)


def _known(files: list[Any], known: Mapping[str, Any]) -> list[Any]:
    """The files that have annotations; how many have none is said."""
    from vlmfix.errors import DataError

    found = [file for file in files if file.name in known]
    if not found:
        raise DataError(f"none of {len(files)} files has annotations", "give the annotations of these pictures")
    if len(found) < len(files):
        options.say(f"vlmfix: {len(files) - len(found)} files have no annotations and are left out", err=True)
    return found


def _shuffled(images: Path, seed: int) -> list[Any]:
    """The files below a folder in random order; fewer pictures are then the first of more."""
    from vlmfix.images import find

    files = list(find(images))
    random.Random(seed).shuffle(files)
    return files


def _annotated(
    files: list[Any], profilers: list[Any], shown: list[str], instances: tuple[Path, ...], captions: tuple[Path, ...]
) -> list[Any]:
    """The files that have annotations; the profiler ablation among ``profilers`` gets to know these.

    Args:
        files: Files below a folder.
        profilers: Changed in place.
        shown: Names of the pictures in the order in which they are shown, filled while that happens.
        instances: COCO instances.
        captions: COCO captions.
    """
    from vlmfix.display import reading
    from vlmfix.evals.benchmarks.chair import Chair
    from vlmfix.evals.benchmarks.coco import read_annotations
    from vlmfix.evals.task import Sample
    from vlmfix.heads.profilers.ablation import Ablation
    from vlmfix.insight.captions import Labels, Word

    places = [place for place, profiler in enumerate(profilers) if isinstance(profiler, Ablation)]
    if not (places and instances and captions):
        raise UsageError(
            "--instances and --captions say what the profiler ablation measures", "give both, and --profiler ablation"
        )
    with reading("annotations") as report:
        annotations = read_annotations(instances, captions, progress=report)
    truths = {
        picture.file: Sample(
            id=str(picture.id),
            image=picture.file,
            prompt="",
            target={"objects": picture.objects, "captions": picture.captions},
        )
        for picture in annotations.pictures.values()
        if picture.captions  # without any, what it shows would be known in part alone
    }
    known = _known(files, truths)

    def words(number: int, caption: str) -> list[Word]:
        found = Chair().mentions(truths[shown[number]], caption)
        return [Word(mention.start, mention.end, not absent) for mention, absent in found]

    profilers[places[0]] = Ablation(labels=Labels(words=words, about=annotations.sources))
    return known


def _opened(files: list[Any], shown: list[str]) -> Generator[Any]:
    """The pictures among some files, whose names are added to ``shown``; the others are named on stderr."""
    from vlmfix.errors import DataError, PassingError
    from vlmfix.images import read_ahead

    with closing(read_ahead(files)) as opened:
        for file, picture in opened:
            if isinstance(picture, PassingError):
                raise PassingError(f"{file.path}: {picture.message}", picture.hint)
            if isinstance(picture, DataError):
                options.say(f"vlmfix: {file.name} is left out: {picture.message}", err=True)
            else:
                shown.append(file.name)
                yield picture.image


def _show(found: dict[str, Any], count: int) -> None:
    """Prints, for each profile, its origin and its strongest heads."""
    from rich.table import Table

    from vlmfix.terminal import rendered

    parts: list[Any] = []
    for name, profile in found.items():
        card, heads = profile.card, profile.top(min(count, profile.scores.numel()))
        reliable = "unknown" if card.reliability is None else f"{card.reliability:.3f}"
        parts += [
            f"{escaped(name)}: {escaped(card.model or card.model_type)}, {card.pictures} pictures, "
            f"reliability of the ranking {reliable}" + (" (stable)" if card.stable else "")
        ]
        table = Table(box=None, pad_edge=False)
        for title in ("rank", "layer", "head", "score", "standard error"):
            table.add_column(title, justify="right")
        for rank, (layer, head) in enumerate(heads, start=1):
            score, error = (float(part[layer, head]) for part in (profile.scores, profile.stderr))
            table.add_row(str(rank), str(layer), str(head), f"{score:.4g}", "-" if error != error else f"{error:.2g}")
        parts.append(table)
        parts += [f"{escaped(key)}: {_listed(value)}" for key, value in profile.details.items() if value.dim() == 1]
        parts.append("")
    click.echo(rendered(*parts), nl=False)


def _show_directions(found: dict[str, Any]) -> None:
    """Prints, for each method, where its directions come from, and their tensors."""
    for name, part in found.items():
        card = part.card
        click.echo(f"{escaped(name)}: {escaped(card.model or card.model_type)}, {card.pictures} pictures")
        for key, tensor in part.tensors.items():
            click.echo(f"  {escaped(key)}: {' x '.join(map(str, tensor.shape))}")


def _holds_directions(file: Path) -> bool:
    """Whether a file says that it holds directions."""
    from vlmfix.errors import DataError
    from vlmfix.heads.directions.kept import FORMAT
    from vlmfix.heads.profile import about_of

    try:
        about_of(file, FORMAT)
    except DataError:
        return False
    return True


def _shown_directions(file: Path, name: str | None, *, as_json: bool) -> None:
    from vlmfix.errors import DataError
    from vlmfix.heads.directions.kept import load_directions

    found = load_directions(file)
    if name is not None and name not in found:
        raise DataError(f"{file} holds directions for {', '.join(found)}, not for {name}", "name one of them")
    found = found if name is None else {name: found[name]}
    if not as_json:
        _show_directions(found)
        return
    options.say_json(
        {
            key: {"card": asdict(part.card), "tensors": {k: list(v.shape) for k, v in part.tensors.items()}}
            for key, part in found.items()
        }
    )


def _listed(values: Any) -> str:  # noqa: ANN401 (a tensor; torch is not imported here)
    return " ".join(f"{value:.4g}" for value in values.tolist()) or "none"


def _json(profile: Any, count: int) -> dict[str, Any]:  # noqa: ANN401 (a HeadProfile)
    def number(value: float) -> float | None:
        return value if value == value else None  # JSON has no NaN

    heads = [
        {
            "layer": layer,
            "head": head,
            "score": float(profile.scores[layer, head]),
            "stderr": number(float(profile.stderr[layer, head])),
        }
        for layer, head in profile.top(min(count, profile.scores.numel()))
    ]
    details = {key: [number(x) for x in value.flatten().tolist()] for key, value in profile.details.items()}
    return {"card": asdict(profile.card), "heads": heads, "details": details}
