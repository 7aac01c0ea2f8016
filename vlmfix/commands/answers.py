"""`vlmfix run` and `vlmfix ask`: pictures and questions in, answers out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vlmfix.commands import options
from vlmfix.commands.convert import written
from vlmfix.errors import UsageError
from vlmfix.extras import need
from vlmfix.jobs.export import JSONL, NAMES, targets
from vlmfix.parsing import escaped
from vlmfix.settings import EMBEDDED, GROUNDED, MEASURES, OWN, Settings

if TYPE_CHECKING:
    from vlmfix.images import Found
    from vlmfix.jobs.folder import Progress

LOOKED_AT = 100
"""Pictures of a folder that are looked at to see whether the model knows such."""
PHOTOGRAPHS = "llava-hf/llava-1.5-7b-hf"
"""A model to name where photographs are shown to one that knows none."""


@click.command()
@click.argument("pictures", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the answers.")
@click.option("--column", help="Column of the paths (or bytes), of a CSV or Parquet file.  [default: image or path]")
@click.option("--prompt", help="Asked about every picture.  [default: Please describe this image in detail.]")
@click.option("--prompts", type=click.Path(path_type=Path), help="CSV file with the columns prompt or image,prompt.")
@options.batch_size("Questions at a time.")
@click.option(
    "--save-maps",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for refined pictures and maps, of carve and vicrop.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice([JSONL, *NAMES]),
    help="Write the answers also in this form when all are done; may be given several times.  [default: jsonl alone]",
)
@click.option("--words", is_flag=True, help="Keep of every word how sure the model was, which vlmfix view shows.")
@click.option(
    "--confidence",
    type=click.Choice(MEASURES),
    help="Keep of every answer and token how unsure it was, weighted by relevance; sar+grounding flags objects, too.",
)
@click.option(
    "--similarity",
    metavar="own|MODEL",
    default=OWN,
    show_default=True,
    help="What tells relevance: the model's own token embeddings, or a sentence encoder, by folder or Hub id.",
)
@options.retry_failed("OUT/failed.jsonl")
@click.option(
    "--devices", metavar="all|N,N,...", help="GPUs that answer together, a process on each.  [default: one, --device]"
)
@click.option(
    "--shard", metavar="I/N", help="Ask part I of N of the pictures, 0 <= I < N, into OUT/shards; vlmfix merge joins."
)
@click.option(
    "--steal", is_flag=True, help="Share the run with all workers started so; vlmfix merge joins what they write."
)
@click.option(
    "--on", metavar="ray|ray://HOST:PORT", help="Answer on a Ray cluster, by an actor on each GPU; extra vlmfix[ray]."
)
@options.generation_options()
def run(
    pictures: Path,
    out: Path,
    column: str | None,
    prompt: str | None,
    prompts: Path | None,
    batch_size: int | None,
    save_maps: Path | None,
    formats: tuple[str, ...],
    words: bool,
    confidence: str | None,
    similarity: str,
    retry_failed: bool,
    devices: str | None,
    shard: str | None,
    steal: bool,
    on: str | None,
    settings: Settings,
) -> None:
    """Ask about every picture in PICTURES: a folder, a picture, a tar or Parquet file, or a list of paths and URLs.

    A list ends in .txt, .list or .csv. Answers go to OUT/answers.jsonl, failures to OUT/failed.jsonl, settings and
    totals to OUT/run.json. Started again with the same options, it goes on where it was; what failed stays failed
    unless --retry-failed is given.
    """
    if devices is not None and settings.device != "auto":
        raise UsageError("--device and --devices are both given", "give one of them")
    if devices is not None and settings.device_map is not None:
        raise UsageError("--device-map spreads a model, and --devices has one on each", "give one of them")
    if confidence == GROUNDED:
        need("eval")  # finds the object words
    kinds = [kind for kind in dict.fromkeys(formats) if kind != JSONL]
    if steal or on is not None:
        shared = "--steal" if steal else "--on"
        for given, name, instead in (
            (steal and on is not None, "--on", "give one of them"),
            (shard, "--shard", "leave it out: the run is divided anyway"),
            (save_maps, "--save-maps", "save the maps in a run of its own"),
            (retry_failed, "--retry-failed", f"ask again in the joined folder, without {shared}"),
            (steal and kinds, "--format", "merge, and then vlmfix convert"),
            (on is not None and devices, "--devices", "leave it out: Ray has an actor for each GPU"),
        ):
            if given:
                raise UsageError(f"{name} does not go with {shared}", instead)
    if on is not None and on != "ray" and not on.startswith("ray://"):
        raise UsageError(f"--on {on}: there is no such place", "give ray, or ray://HOST:PORT")
    options.quieten()
    from vlmfix.crew import devices_of
    from vlmfix.display import run_display, shared_summary
    from vlmfix.jobs import folder
    from vlmfix.jobs.shards import Shard
    from vlmfix.sources import source_of

    part = None if shard is None else Shard.of(shard)
    place = out if part is None else part.folder(out)
    for kind in kinds:
        targets(place, kind)  # before anything is answered
    questions = folder.Questions.of(source_of(pictures, column=column), prompt, prompts)
    if steal:
        with options.stoppable(out), run_display() as report:
            done = folder.steal(
                pictures,
                out,
                questions=questions,
                column=column,
                settings=replace(settings, words=words, confidence=confidence, similarity=similarity),
                batch_size=batch_size,
                devices=() if devices is None else devices_of(devices),
                remarks=functools.partial(_told, settings),
                report=report,
                loader=_loading,
                named=_named,
            )
        options.say(shared_summary(done, out), err=True, lines=True)
        return
    if on is not None:
        from vlmfix.jobs.folder.on_ray import run_on_ray

        with options.stoppable(out), run_display() as report:
            end = run_on_ray(
                pictures,
                out,
                address=on,
                questions=questions,
                column=column,
                settings=replace(settings, words=words, confidence=confidence, similarity=similarity),
                batch_size=batch_size,
                remarks=functools.partial(_told, settings),
                report=report,
                named=_named,
            )
        _conclude(end, out, settings, kinds)
        return
    with options.stoppable(place), run_display() as report:
        end = folder.run(
            pictures,
            out,
            questions=questions,
            column=column,
            settings=replace(settings, words=words, confidence=confidence, similarity=similarity),
            batch_size=batch_size,
            save_maps=save_maps,
            retry_failed=retry_failed,
            devices=() if devices is None else devices_of(devices),
            shard=part,
            remarks=functools.partial(_told, settings),
            report=report,
            loader=_loading,
            named=_named,
        )
    _conclude(end, place, settings, kinds)


def _conclude(end: Progress, place: Path, settings: Settings, kinds: Iterable[str]) -> None:
    from vlmfix.display import summary

    options.say(summary(end, place, settings.max_new_tokens), err=True, lines=True)
    for kind in kinds:
        written(place, kind)
    if end.in_vain:
        click.get_current_context().exit(1)


def _told(settings: Settings, files: Iterable[Found]) -> list[str]:
    """Says at once, before anything is answered, what somebody who begins may not know."""
    notes = [*_unmitigated(settings), *_unfamiliar(settings.model, files)]
    for note in notes:
        options.say(f"vlmfix: {note}", err=True)
    return notes


def _unmitigated(settings: Settings) -> Iterator[str]:
    given = click.get_current_context().get_parameter_source("decoder") is not ParameterSource.DEFAULT
    if not given and settings.num_beams == 1:
        how = "plain decoding" if settings.temperature == 0 else "plain sampling"
        yield f"no --decoder is given: {how} mitigates nothing; try --decoder @keep-recall"


def _unfamiliar(model: str, files: Iterable[Found]) -> Iterator[str]:
    """Says that an embedded model is shown what it does not know, where one of the first pictures was not drawn."""
    from vlmfix.world.drawn import is_drawn

    if model not in EMBEDDED:
        return
    for file in islice(files, LOOKED_AT):
        if file.part is not None or file.cell is not None or file.url:
            continue  # of a tar or Parquet file, or in the web
        try:
            drawn = bool(file.problem) or is_drawn(file.path)
        except Exception:  # Pillow's readers raise nearly anything on a damaged file, of which the run tells
            continue
        if not drawn:
            yield (
                f"{file.name} does not look like a scene of vlmfix world, and {model} knows only those: what it says "
                f"of other pictures is made up; give a model that has seen photographs, such as --model {PHOTOGRAPHS}"
            )
            return


def _named(text: str) -> list[tuple[str, int, int]]:
    """Finds the object words of an answer by CHAIR's rules: what each names, and its begin and end."""
    from vlmfix.evals.benchmarks.words import words_of

    return [(mention.node, mention.start, mention.end) for mention in words_of(None).read(text).mentions]


def _loading(model: str, **how: Any) -> Any:  # noqa: ANN401 (its type would import torch)
    """Loads a model, in whatever process."""
    options.quieten()
    from vlmfix.display import loading

    return loading(model, **how)


@click.command()
@click.argument("pictures", nargs=-1, metavar="PICTURE...")
@click.argument("question")
@click.option(
    "--earlier",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON file of chat messages that were said before the question.",
)
@options.generation_options("num_beams")
def ask(pictures: tuple[str, ...], question: str, earlier: Path | None, settings: Settings) -> None:
    """Ask one QUESTION about one PICTURE, or several: files, or addresses in the web."""
    if not question.strip():
        raise UsageError("the question is empty", "write a question or an instruction")
    if not pictures and earlier is None:
        raise UsageError("there is no picture", "give one or more, and then the question")
    options.quieten()
    from vlmfix.decoders import parse
    from vlmfix.display import loading
    from vlmfix.generation import check_settings
    from vlmfix.images import Found, named_picture
    from vlmfix.models.conversation import conversation

    decoder = parse(settings.decoder)
    check_settings(decoder, settings)
    said, shown = conversation(earlier) if earlier is not None else ((), [])
    shown += [named_picture(picture) for picture in pictures]
    _told(settings, [Found(Path(picture).name, Path(picture)) for picture in pictures])
    vlm = loading(settings.model, **settings.loading())
    pieces = vlm.stream(
        shown,
        question,
        decoder=decoder,
        earlier=said,
        **{name: value for name, value in settings.decoding().items() if name != "num_beams"},
    )
    terminal = sys.stdout.isatty()  # a program that reads the answer gets it as it is
    with closing(pieces):
        for piece in pieces:
            click.echo(escaped(piece, lines=True) if terminal else piece, nl=False)
    click.echo()
