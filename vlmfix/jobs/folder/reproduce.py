"""Answers a folder of pictures again from its run card, and reports which answers differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmfix.card import changed_facts, changed_reading, decoder_again, refuse_other_pictures, settings_again
from vlmfix.errors import DataError, UsageError
from vlmfix.generation import VLM, load
from vlmfix.jobs.folder.job import Progress, run
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.lines import ANSWER, ANSWERS, CARD
from vlmfix.jobs.shards import SHARD, Shard
from vlmfix.parsing import some
from vlmfix.records import read_json, read_lines
from vlmfix.settings import DECODED, LOADED, MODEL, REQUESTED, decoding_in
from vlmfix.shapes import FLAG, PATH, SIZE, TEXT, fields, list_of, mapping_of
from vlmfix.sources import Source, source_of

FINISHED = fields(
    {
        "finished": FLAG,
        "settings": fields(
            {
                "pictures": PATH,
                "prompt": TEXT.or_null(),
                "prompts": TEXT.or_null(),
                "model": TEXT,
                **MODEL,
                "decoder": TEXT,
                **DECODED,
            },
            {
                "decoder_facts": mapping_of(TEXT),
                "plugins": mapping_of(TEXT).or_null(),
                "shard": SHARD.or_null(),
                "column": TEXT.or_null(),
                **LOADED,
                **REQUESTED,
            },
        ),
        "sessions": list_of(fields({"prompts_file": PATH.or_null(), "batch_size": SIZE}), least=1),
    }
)
"""Shape that a run card must have for the run to be repeated."""


@dataclass(frozen=True)
class Repeated:
    """Compares the second run of a folder with the first.

    Attributes:
        out: Folder of the second run.
        answers: Answers of the first run.
        other: (picture, prompt) of questions that the second run answers otherwise or not at all.
        facts: Facts of the decoder beside parameters that differed in the second run, such as a profile's digest:
            name to (before, now).
    """

    out: Path
    answers: int
    other: tuple[tuple[str, str], ...]
    facts: dict[str, tuple[str | None, str | None]]


def reproduce(
    folder: Path,
    out: Path,
    *,
    images: Path | None = None,
    model: str | None = None,
    prompts: Path | None = None,
    device: str = "auto",
    report: Callable[[Progress], None] = lambda progress: None,
    loader: Callable[..., VLM] = load,
) -> Repeated:
    """Runs a folder again with the settings of its card.

    Before it loads the model, it checks that pictures, prompts, weights and plug-ins are those of the run.

    Args:
        folder: A folder that ``run`` wrote and finished.
        out: Folder of the second run; a run begun there is resumed.
        images: Folder of the pictures, or the one picture; None for the path of the run.
        model: Directory of the model; None for the directory of the run.
        prompts: The file of prompts; None for the file of the run.
        device: Where to run; another kind of device rounds differently, and single words may change.
        report: Called whenever something was written.
        loader: Loads the model.

    Raises:
        UsageError: ``model`` is given for a model of the Hub, or ``prompts`` for a run that had no file of them.
        DataError: The run is unfinished, or pictures, weights or the file of prompts are not there, or not those of the
            run.
        PluginError: A decoder of another distribution, or in a file, is not that of the run.
    """
    card = read_json(folder / CARD, FINISHED)
    if not card["finished"]:
        raise DataError(f"{folder} is unfinished", "finish it with the command that began it")
    before, session = card["settings"], card["sessions"][-1]
    pictures = Path(before["pictures"]) if images is None else images
    source = _source_again(folder, pictures, before.get("column"), out)
    questions = questions_again(folder, before, session["prompts_file"], prompts, source)
    _refuse_other_pictures(folder, source)
    decoder = decoder_again(str(folder), before["decoder"], before.get("plugins"))
    settings = settings_again(
        str(folder),
        before,
        decoding_in(before),
        model=model,
        device=device,
        decoder=before["decoder"],
        decoders=[decoder],
    )
    shard = Shard.of(before["shard"]) if before.get("shard") else None
    run(
        pictures,
        out,
        shard=shard,
        questions=questions,
        column=before.get("column"),
        settings=settings,
        batch_size=session["batch_size"],
        report=report,
        loader=loader,
    )
    again = out if shard is None else shard.folder(out)
    first, second = _answers(folder), _answers(again)
    other = tuple(key for key, answer in first.items() if second.get(key) != answer)
    now = read_json(again / CARD, FINISHED)["settings"]
    facts = changed_facts(before.get("decoder_facts"), now.get("decoder_facts")) | changed_reading(before, now)
    return Repeated(again, len(first), other, facts)


def questions_again(
    folder: Path, settings: Mapping[str, str | None], prompts: str | None, elsewhere: Path | None, source: Source
) -> Questions:
    """Reads the questions of a run again.

    Args:
        folder: The run's folder, for messages.
        settings: Settings of its card.
        prompts: Where its file of prompts was; None when it had none.
        elsewhere: Where that file is now; None for where it was.
        source: The pictures; a CSV file may have the prompts, too.

    Raises:
        UsageError: ``elsewhere`` is given for a run that had no file of prompts, or whose pictures' file has them.
        DataError: The file is not there, or has other prompts now.
    """
    if prompts is None:
        if elsewhere is not None:
            raise UsageError("the run had one prompt for every picture, and no file", "leave --prompts out")
        if not settings["prompt"]:
            raise DataError(f"{folder / CARD} says neither what was asked nor from which file", "restore the file")
        return Questions.text(settings["prompt"])
    path = Path(prompts) if elsewhere is None else elsewhere
    if source.prompts is not None:
        questions, path = Questions.of(source, file=elsewhere), source.place
    elif not os.path.isfile(path):
        raise DataError(
            f"there is no file {path} with the prompts of {folder}", "give the file that they are in now with --prompts"
        )
    else:
        questions = Questions.file(path)
    if questions.about["prompts"] != settings["prompts"]:
        raise DataError(f"{path} has other prompts than the run in {folder}", "put the former file back")
    return questions


def _source_again(folder: Path, pictures: Path, column: str | None, out: Path) -> Source:
    if not os.path.exists(pictures):  # unlike a path's own method, it accepts names that no file can have
        raise DataError(
            f"there is no {pictures} with the pictures of {folder}", "give the folder that they are in with --images"
        )
    return source_of(pictures, column=column, skip=out)


def _refuse_other_pictures(folder: Path, source: Source) -> None:
    """Refuses, before the model is loaded, pictures that differ from those that the run was shown."""
    lines = read_lines(folder / ANSWERS, ANSWER)
    known = {line["image"]: line["sha256"] for line in lines if "sha256" in line}
    files = {file.name: file for file in source if file.name in known}
    if missing := [name for name in known if name not in files]:
        raise DataError(
            f"{len(missing)} of {len(known)} pictures of {folder} are not in {source.place}: {some(missing)}",
            "give the folder that holds them with --images",
        )
    hint = "give the folder of the same pictures with --images"
    refuse_other_pictures(folder, source.place, [files[name] for name in known], known, hint=hint)


def _answers(folder: Path) -> dict[tuple[str, str], str]:
    return {(line["image"], line["prompt"]): line["answer"] for line in read_lines(folder / ANSWERS, ANSWER)}
