"""Folders that `vlmfix run` wrote, read to be looked at."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmfix.errors import VlmfixError
from vlmfix.images import Found
from vlmfix.jobs.lines import ANSWER, ANSWERS, CARD, FAILED, FAILURE
from vlmfix.parsing import WORD
from vlmfix.records import read_json, read_lines
from vlmfix.settings import DECODED, LOADED, REQUESTED, decoding_in, decoding_text
from vlmfix.shapes import FLAG, PATH, TEXT, fields, list_of, mapping_of
from vlmfix.sources import TAR, source_of
from vlmfix.view.pictures import below
from vlmfix.view.sheet import PictureFile, Said, Truth, Word

SESSION = fields({}, {"started": TEXT, "updated": TEXT, "device": TEXT, "versions": mapping_of(TEXT.or_null())})
SHOWN = fields(
    {
        "settings": fields(
            {"pictures": PATH, "model": TEXT, "decoder": TEXT, **DECODED},
            {"commit": TEXT.or_null(), "column": TEXT.or_null(), "dtype": TEXT, **LOADED, **REQUESTED},
        )
    },
    {"sessions": list_of(SESSION), "updated": TEXT, "finished": FLAG},
)
"""What a run card must say for its answers to be shown, and what is shown of it besides."""
VERSIONS = ("vlmfix", "torch", "transformers")


@dataclass(frozen=True, eq=False)
class Asked:
    """One question of a folder with the answers that it has there.

    Attributes:
        picture: What it is about; None for a question without a picture.
        prompt: What was asked.
        said: Answers by the name of the arm.
        truth: What is known; None when nothing is.
        group: Part of the benchmark that it belongs to.
    """

    picture: PictureFile | None
    prompt: str
    said: Mapping[str, Said]
    truth: Truth | None = None
    group: str = ""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a folder holds.

    Attributes:
        folder: Where.
        arms: For each arm what was run, by the names of the facts; the decoder's specification is among them.
        asked: The questions, in order.
        kind: What wrote it, in words.
    """

    folder: Path
    arms: Mapping[str, Mapping[str, str]]
    asked: list[Asked]
    kind: str = "vlmfix run"


def read_answers(folder: Path, images: Path | None = None) -> Answers:
    """Reads a folder that ``vlmfix run`` wrote, finished or not.

    Args:
        folder: The folder.
        images: Where its pictures are now; None for where they were.

    Raises:
        DataError: A file is missing or is not what it should be.
    """
    card = read_json(folder / CARD, SHOWN)
    settings = card["settings"]
    place = Path(settings["pictures"]) if images is None else images
    arm = settings["decoder"]
    picture = _pictures(folder, place, settings.get("column"))
    asked: list[Asked] = []
    known: dict[str, PictureFile] = {}
    for line in read_lines(folder / ANSWERS, ANSWER):
        name = line["image"]
        if name not in known:
            known[name] = picture(name, line.get("sha256", ""))
        asked.append(Asked(known[name], line["prompt"], {arm: _said(line)}))
    for line in read_lines(folder / FAILED, FAILURE):
        name = line["image"]
        asked.append(
            Asked(known.get(name) or picture(name), line.get("prompt", ""), {arm: Said("", failed=line["reason"])})
        )
    asked.sort(key=lambda question: "" if question.picture is None else question.picture.name.split("/"))
    facts = {
        "folder": str(folder),
        "decoder": arm,
        **model_facts(settings),
        "decoding": decoding_text(decoding_in(settings)),
        **session_facts(card.get("sessions", ()), str(card.get("updated", ""))),
    }
    if not card.get("finished"):
        facts["state"] = "unfinished"
    return Answers(folder, {arm: facts}, asked)


def _said(line: Mapping[str, Any]) -> Said:
    text, scored = line["answer"], line.get("scored", ())
    skipped = (line["skipped"], line["tokens"]) if "skipped" in line else None
    said = Said(text, line.get("finish", ""), logprob=line.get("logprob"), sar=line.get("sar"), skipped=skipped)
    known = [(begin, end, logprob) for begin, end, logprob, *_ in line.get("words", ())]
    if not known and scored:
        spans = [found.span() for found in WORD.finditer(text)]
        known = [(*span, sum(token[2] for token in _within(scored, *span))) for span in spans]
    flagged = [(found["begin"], found["end"]) for found in line.get("objects", ()) if found["flagged"]]
    words: list[Word] = []
    for begin, end, logprob in known:
        if not (words[-1].end if words else 0) <= begin < end <= len(text):  # somebody has changed the text
            return said
        sar = sum(token[4] for token in _within(scored, begin, end)) if scored else None
        marked = any(first < end and last > begin for first, last in flagged)
        words.append(Word(begin, end, math.exp(min(logprob, 0.0)), sar=sar, flagged=marked))
    return replace(said, words=tuple(words))


def _within(scored: Sequence[Sequence[float]], begin: int, end: int) -> list[Sequence[float]]:
    """The tokens that have a part of a span of the text."""
    return [token for token in scored if token[0] < end and token[1] > begin]


def _pictures(folder: Path, place: Path, column: str | None) -> Callable[..., PictureFile]:
    """Finds out where the pictures of a run are, and returns what makes the picture of a name and a digest.

    In a folder a name says where. What a list names, and where a picture stands in a tar file, only these know; a
    picture that they do not name any more is gone.
    """
    names = {line["image"] for line in read_lines(folder / ANSWERS, ANSWER)}
    listed = os.path.isfile(place)  # where a name is too long for a file, that of pathlib raises
    if not listed and not any(f"{TAR}/" in name.lower() for name in names):
        return lambda name, sha256="": PictureFile(name, below(place, name), sha256)
    try:
        found = {file.name: file for file in source_of(place, column=column, skip=folder) if file.name in names}
    except VlmfixError:  # what was a list is something else now
        found = {}
    gone = Found("", place / "gone")

    def picture(name: str, sha256: str = "") -> PictureFile:
        file = found.get(name, gone)
        return PictureFile(name, file.path, sha256, file.part, file.url, file.cell)

    return picture


def model_facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Says which model a card is of."""
    commit = settings.get("commit")
    found = {"model": f"{settings['model']} ({commit[:12]})" if commit else settings["model"]}
    found |= {"precision": settings["dtype"]} if "dtype" in settings else {}
    return found | {name.replace("_", " "): f"{settings[name]}" for name in LOADED if settings.get(name) is not None}


def session_facts(sessions: Any, updated: str = "") -> dict[str, str]:  # noqa: ANN401 (JSON values, checked before)
    """Says when, where and by which versions a folder was written."""
    if not sessions:
        return {}
    first, last = sessions[0], sessions[-1]
    times = [
        time[:16].replace("T", " ") for time in (first.get("started", ""), updated or last.get("updated", "")) if time
    ]
    found = {"date": " to ".join(dict.fromkeys(times)), "device": last.get("device", "")}
    found |= {name: last.get("versions", {}).get(name) or "" for name in VERSIONS}
    return {name: value for name, value in found.items() if value}
