"""The demonstration: drawn scenes described plain and mitigated, and what is not there marked."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from vlmfix.decoders import Decoder, parse
from vlmfix.errors import DataError
from vlmfix.files import replacing
from vlmfix.generation import VLM, load
from vlmfix.images import open_picture
from vlmfix.jobs.folder import DESCRIBE
from vlmfix.parsing import escaped
from vlmfix.world import coco
from vlmfix.world.categories import category
from vlmfix.world.mentions import mentions
from vlmfix.world.scenes import scene

SCENES = 12
MAX_NEW_TOKENS = 96
PLAIN = "greedy"

Mark = Literal["", "present", "absent"]


@dataclass(frozen=True)
class Described:
    """One answer, cut where it names an object.

    Attributes:
        pieces: The text in order; each piece with ``present`` or ``absent`` when it names an object.
        named: COCO names of the objects that it mentions, each once.
    """

    pieces: tuple[tuple[str, Mark], ...]
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
    count: int = SCENES,
    loader: Callable[..., VLM] = load,
) -> Comparison:
    """Describes drawn scenes with the embedded model, plain and with a decoder.

    Writes the scenes and ``index.html``, a page of its own that shows everything.

    Args:
        out: Folder to write; made when it is missing.
        decoder: The decoder to compare with plain decoding.
        seed: Seed of the scenes.
        count: Number of scenes.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.

    Raises:
        UsageError: The decoder's specification is not allowed.
        DataError: ``out`` cannot be written, or is in use for something else.
    """
    arms = {spec: parse(spec) for spec in (PLAIN, decoder)}
    page_file = out / "index.html"
    _refuse_foreign(page_file)
    folder = out / f"scenes-{seed}-{count}"
    coco.make(folder, count=count, seed=seed)
    files = [folder / "images" / coco.image_name(number) for number in range(count)]
    vlm = loader("tiny")
    texts = {spec: _answers(vlm, files, arm) for spec, arm in arms.items()}
    comparison = Comparison(counts={spec: Count() for spec in arms})
    for number, file in enumerate(files):
        present = tuple(scene(seed, number).counts())
        answers = {spec: describe(texts[spec][number], present) for spec in arms}
        comparison.scenes.append(Scene(image=file, present=present, answers=answers))
        for spec, described in answers.items():
            _add(comparison.counts[spec], described, present)
    with replacing(page_file) as draft:
        draft.write(page(comparison).encode())
    return comparison


def _refuse_foreign(path: Path) -> None:
    """Refuses to write over a page that is none of the demonstration's."""
    try:
        ours = not path.exists() or (path.is_file() and path.read_bytes().startswith(BEGINNING.encode()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "choose another --out") from error
    if not ours:
        raise DataError(f"{path} is there and is no page of the demonstration", "choose another --out")


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
    pieces: list[tuple[str, Mark]] = []
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
    arms = list(comparison.counts)
    head = "".join(f"<th>{html.escape(escaped(arm))}</th>" for arm in arms)
    rows = "".join(_row(shown, arms) for shown in comparison.scenes)
    sums = "".join(
        f"<td><b>{count.hallucinated}</b> of {count.mentioned} objects mentioned are not in the picture<br>"
        f"{count.found} of {count.present} objects in the pictures are mentioned</td>"
        for count in comparison.counts.values()
    )
    return BEGINNING + PAGE.format(head=head, rows=rows, sums=sums)


def _row(shown: Scene, arms: list[str]) -> str:
    cells = "".join(f"<td>{_marked(shown.answers[arm])}</td>" for arm in arms)
    contents = html.escape(", ".join(shown.present))
    picture = f'<img src="{_thumbnail(shown.image)}" alt="{contents}"><small>{contents}</small>'
    return f"<tr><td>{picture}</td>{cells}</tr>\n"


def _marked(described: Described) -> str:
    tags = {"": "{}", "present": "<b>{}</b>", "absent": "<del>{}</del>"}
    return "".join(tags[mark].format(html.escape(escaped(words, lines=True))) for words, mark in described.pieces)


def _thumbnail(path: Path) -> str:
    data = io.BytesIO()
    open_picture(path).image.resize((256, 256), Image.Resampling.LANCZOS).save(data, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


BEGINNING = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>vlmfix demo</title>\n'
"""What tells a page of the demonstration from others."""
PAGE = """<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #222; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .75rem; border-bottom: 1px solid #ddd; }}
td:first-child {{ width: 256px; }}
img {{ display: block; width: 256px; height: 256px; border-radius: 4px; }}
small {{ color: #666; }}
b {{ font-weight: 600; }}
del {{ color: #b00020; font-weight: 600; }}
</style></head><body>
<h1>Plain decoding and a mitigation, side by side</h1>
<p>The model that comes with vlmfix describes scenes that it has never seen. Under each picture stands
what is in it. <b>Bold</b> objects are in the picture, <del>struck</del> ones are not.</p>
<table><thead><tr><th>picture</th>{head}</tr></thead>
<tbody>
<tr><td>all pictures</td>{sums}</tr>
{rows}</tbody></table>
</body></html>
"""
