"""The demonstration: drawn scenes described plain and mitigated, and what is not there marked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vlmfix.decoders import Decoder, parse
from vlmfix.generation import VLM, load
from vlmfix.images import open_picture
from vlmfix.jobs.folder import DESCRIBE
from vlmfix.view.page import page_of, refuse_foreign, write_page
from vlmfix.view.sheet import Card, Column, Judgement, Kind, PictureFile, Row, Said, Sheet
from vlmfix.world import coco
from vlmfix.world.categories import category
from vlmfix.world.mentions import mentions
from vlmfix.world.scenes import scene

SCENES = 12
MAX_NEW_TOKENS = 96
PLAIN = "greedy"
NAME = "vlmfix demo"
"""What tells a page of the demonstration from others."""
HEADING = "Plain decoding and a mitigation, side by side"
INTRO = "The model that comes with vlmfix describes scenes that it has never seen."


@dataclass(frozen=True)
class Described:
    """One answer, cut where it names an object.

    Attributes:
        pieces: The text in order; each piece with ``present`` or ``absent`` when it names an object.
        named: COCO names of the objects that it mentions, each once.
    """

    pieces: tuple[tuple[str, Kind], ...]
    named: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """One picture with its answers.

    Attributes:
        image: The picture's file.
        present: COCO names of what is in it.
        answers: What each decoder said, by the decoder's name as it was given.
    """

    image: Path
    present: tuple[str, ...]
    answers: dict[str, Described]


@dataclass
class Count:
    """Objects over all scenes, each counted once per scene."""

    mentioned: int = 0
    hallucinated: int = 0
    found: int = 0
    present: int = 0


@dataclass
class Comparison:
    """All scenes, and the counts of each decoder."""

    scenes: list[Scene] = field(default_factory=list)
    counts: dict[str, Count] = field(default_factory=dict)


def demonstrate(
    out: Path,
    *,
    decoder: str,
    seed: int,
    model: str = "tiny",
    count: int = SCENES,
    loader: Callable[..., VLM] = load,
) -> Comparison:
    """Describes drawn scenes with an embedded model, plain and with a decoder.

    Writes the scenes and ``index.html``, a page of its own that shows everything.

    Args:
        out: Folder to write; made when it is missing.
        decoder: The decoder to compare with plain decoding.
        seed: Seed of the scenes.
        model: ``tiny``, ``tiny-qwen`` or ``small``.
        count: Number of scenes.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.

    Raises:
        UsageError: The decoder's specification is not allowed.
        DataError: ``out`` cannot be written, or is in use for something else.
    """
    arms = {spec: parse(spec) for spec in (PLAIN, decoder)}
    page_file = out / "index.html"
    refuse_foreign(page_file, NAME)
    folder = out / f"scenes-{seed}-{count}"
    coco.make(folder, count=count, seed=seed)
    files = [folder / "images" / coco.image_name(number) for number in range(count)]
    vlm = loader(model)
    texts = {spec: _answers(vlm, files, arm) for spec, arm in arms.items()}
    comparison = Comparison(counts={spec: Count() for spec in arms})
    for number, file in enumerate(files):
        present = tuple(scene(seed, number).counts())
        answers = {spec: describe(texts[spec][number], present) for spec in arms}
        comparison.scenes.append(Scene(image=file, present=present, answers=answers))
        for spec, described in answers.items():
            _add(comparison.counts[spec], described, present)
    write_page(page_file, page(comparison), NAME)
    return comparison


def _answers(vlm: VLM, files: list[Path], decoder: Decoder) -> list[str]:
    pictures = [open_picture(file).image for file in files]
    answers = vlm.generate(pictures, DESCRIBE, decoder=decoder, max_new_tokens=MAX_NEW_TOKENS)
    return [answer.text for answer in answers]


def describe(text: str, present: tuple[str, ...]) -> Described:
    """Cuts an answer where it names an object.

    Args:
        text: The answer.
        present: COCO names of what is in the picture.
    """
    names = mentions(text)
    pieces: list[tuple[str, Kind]] = []
    end = 0
    for name in names:  # in the order of the text, so that each is the next occurrence of its own forms
        forms = "|".join(re.escape(form) for form in (category(name).plural, name))
        match = re.compile(rf"\b({forms})\b", re.IGNORECASE).search(text, end)
        if match:
            pieces += [
                (text[end : match.start()], ""),
                (match.group(), "present" if name in present else "absent"),
            ]
            end = match.end()
    pieces.append((text[end:], ""))
    return Described(pieces=tuple(pieces), named=tuple(dict.fromkeys(names)))


def _add(count: Count, described: Described, present: tuple[str, ...]) -> None:
    count.mentioned += len(described.named)
    count.hallucinated += sum(name not in present for name in described.named)
    count.found += sum(name in present for name in described.named)
    count.present += len(present)


def page(comparison: Comparison) -> str:
    """The comparison as one HTML page that needs no other file."""
    columns = tuple(Column(arm, summary=tuple(counted(count))) for arm, count in comparison.counts.items())
    cards = tuple(_card(shown) for shown in comparison.scenes)
    return page_of(Sheet("", columns, cards), len(cards), name=NAME, heading=HEADING, intro=[INTRO])


def counted(count: Count) -> tuple[str, str]:
    """What the objects of a decoder's answers amount to, in two sentences."""
    return (
        f"{count.hallucinated} of {count.mentioned} objects mentioned are not in the picture",
        f"{count.found} of {count.present} objects in the pictures are mentioned",
    )


def _card(shown: Scene) -> Card:
    judged = tuple(_judged(described, shown.present) for described in shown.answers.values())
    said = tuple(Said("".join(words for words, _ in described.pieces)) for described in shown.answers.values())
    truth = f"In the picture: {', '.join(shown.present)}"
    return Card(PictureFile(shown.image.name, shown.image), (Row(DESCRIBE, said, truth, judged),))


def _judged(described: Described, present: tuple[str, ...]) -> Judgement:
    marks, end = list[tuple[int, int, Kind]](), 0
    for words, kind in described.pieces:
        if kind:
            marks.append((end, end + len(words), kind))
        end += len(words)
    return Judgement(tuple(marks), tuple(name for name in described.named if name not in present))
