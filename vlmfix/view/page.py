"""One HTML page of answers that needs nothing from elsewhere; what answers and names hold is text, never markup."""

from __future__ import annotations

import base64
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlmfix import __version__
from vlmfix.errors import DataError
from vlmfix.files import replacing
from vlmfix.parsing import escaped
from vlmfix.view.marks import pieces, side_by_side
from vlmfix.view.pictures import small_pictures
from vlmfix.view.runs import VERSIONS
from vlmfix.view.sheet import Card, Row, Sheet, Word

NAME = "vlmfix view"
Heating = Callable[[Sequence[Card]], Sequence[Card]]
"""Gives cards back, with maps for their words."""
FILTERS = (
    ("differs", "answers differ"),
    ("absent", "names something absent"),
    ("wrong", "wrong"),
    ("failed", "failed"),
    ("cut", "cut off"),
    ("unsure", "least sure"),
)
"""Names of the flags of a row, and what a page calls them."""


LEVELS = (0.1, 0.3, 0.6)
"""Probabilities below which words look ever more doubtful."""


@dataclass(frozen=True)
class Source:
    """Where a page gets a picture from.

    Attributes:
        address: A data URI, or a place on the page's own server; empty when there is nothing to be seen.
        problem: Why, in a sentence.
    """

    address: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """Which part of a sheet a page shows that a server gives out.

    Attributes:
        show: Name of the filter; empty for all.
        find: What was searched for.
        number: Number of the page, from 1.
        pages: How many there are.
        shown: Questions on all of them.
    """

    show: str
    find: str
    number: int
    pages: int
    shown: int


def page(
    sheet: Sheet,
    cards: Sequence[tuple[Card, Source]],
    *,
    name: str = NAME,
    heading: str = "",
    intro: Iterable[str] = (),
    part: Part | None = None,
) -> str:
    """Makes a page.

    Args:
        sheet: What there is to show.
        cards: What of it the page shows, with the sources of its pictures.
        name: The command that makes it; own pages are known by it, see ``write_page``.
        heading: What stands above all; the sheet's title unless given.
        intro: Sentences below; model, time and versions unless given.
        part: Which part it is, of a page that a server gives out; None for a page that is a file.
    """
    shown = [row for card, _ in cards for row in card.rows]
    counted = shown if part is None else list(sheet.rows())
    prompts = {row.prompt for row in sheet.rows() if row.prompt}
    script = _read("page.js")
    text: str = template("page.html.jinja").render(
        name=name,
        version=__version__,
        policy=policy(script, served=part is not None),
        script=script,
        style=style(),
        sheet=sheet,
        heading=heading or sheet.title,
        intro=list(intro) or _subtitle(sheet),
        facts=_facts(sheet),
        prompt=next(iter(prompts)) if len(prompts) == 1 else "",
        notes=[
            *sheet.notes,
            *([_left_out(sheet, len(cards))] if part is None and len(cards) < len(sheet.cards) else []),
        ],
        legend=_legend(sheet, shown),
        filters=FILTERS,
        counts={flag: sum(flag in row.flags for row in counted) for flag, _ in FILTERS},
        total=len(counted),
        count=f"{len(shown)} shown" if part is None else f"{part.shown} of {len(counted)}",
        cards=[_card(card, source) for card, source in cards],
        heated=any(_heated(card) for card, _ in cards),
        served=part is not None,
        chosen="" if part is None else part.show,
        found="" if part is None else part.find,
        number=0 if part is None else part.number,
        pages=0 if part is None else part.pages,
        address=_address,
    )
    return text


def page_of(sheet: Sheet, limit: int, *, heat: Heating = list, **how: Any) -> str:
    """Makes a page with the pictures in it.

    Args:
        sheet: What there is to show.
        limit: The most pictures that it shows.
        heat: Gives the words of the cards that are shown their maps.
        **how: For ``page``.
    """
    cards = heat(sheet.cards[:limit])
    opened = small_pictures(card.picture for card in cards if card.picture is not None)
    sources = [Source() if card.picture is None else embedded(next(opened)) for card in cards]
    return page(sheet, list(zip(cards, sources, strict=True)), **how)


def write_page(path: Path, text: str, name: str = NAME) -> None:
    """Writes a page whole.

    Raises:
        DataError: The file cannot be written, or is there and none of our pages.
    """
    refuse_foreign(path, name)
    with replacing(path) as draft:
        draft.write(text.encode())


def refuse_foreign(path: Path, name: str = NAME) -> None:
    """Refuses to write over what is no page of a command's own.

    Args:
        path: The file, which may be missing.
        name: The command.

    Raises:
        DataError: It is another file, or cannot be read.
    """
    beginning = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}'.encode()
    try:
        ours = not path.exists()
        if path.is_file():
            with path.open("rb") as file:
                ours = file.read(len(beginning)) == beginning
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "choose another --out") from error
    if not ours:
        raise DataError(f"{path} is there and is no page of {name}", "choose another --out")


def embedded(found: bytes | str) -> Source:
    """Returns the source of a picture that stands in the page, or why there is none."""
    if isinstance(found, str):
        return Source(problem=found)
    return Source("data:image/jpeg;base64," + base64.b64encode(found).decode())


def style() -> str:
    """Returns the style sheet of all pages."""
    return _read("page.css")


def template(name: str) -> Any:  # noqa: ANN401 (jinja2's own type names no fields)
    """Returns a template of pages; what it shows is text, never markup."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vlmfix.view", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = lambda text: escaped(text, lines=True)
    environment.filters["doubt"] = doubt
    environment.filters["sure"] = lambda logprob: f"{math.exp(min(logprob, 0.0)):.0%}"
    return environment


@cache
def _read(name: str) -> str:
    return files("vlmfix.view").joinpath("template", name).read_text(encoding="utf-8")


def policy(script: str = "", *, served: bool = False) -> str:
    """Returns what a browser may load and run of a page.

    Args:
        script: The page's own script, if it has one; it and the style are known by their digests.
        served: Whether the page comes from a server, which has its pictures, too.
    """
    rules = [
        "default-src 'none'",
        *([f"script-src 'sha256-{_digest(script)}'"] if script else []),
        f"style-src 'sha256-{_digest(style())}'",
        f"img-src data:{' ' + repr('self') if served else ''}",
        "base-uri 'none'",
        "form-action 'self'" if served else "form-action 'none'",
    ]
    return "; ".join(rules)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(sheet: Sheet) -> list[tuple[str, list[str]]]:
    """What was run, fact by fact, with the values of all columns."""
    names = dict.fromkeys(name for column in sheet.columns for name in column.facts)
    return [(name, [column.facts.get(name, "") for column in sheet.columns]) for name in names]


def _subtitle(sheet: Sheet) -> list[str]:
    """Model, time and versions, which all columns may share or not."""
    known = {name: list(dict.fromkeys(filter(None, values))) for name, values in _facts(sheet)}
    parts = [", ".join(known[name]) for name in ("model", "date") if known.get(name)]
    parts += [f"{name} {', '.join(known[name])}" for name in VERSIONS if known.get(name)]
    return [" · ".join(parts)] if parts else []


def _left_out(sheet: Sheet, shown: int) -> str:
    left = len(sheet.cards) - shown
    return (
        f"The first {shown} of {len(sheet.cards)} pictures are on this page, {left} are left out: --limit says how many"
        f" it may have, and vlmfix view --serve shows all, page by page. The figures above are of all."
    )


def _legend(sheet: Sheet, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Class, sample and meaning of each kind of mark that a page has."""
    kinds = {kind for row in rows for judgement in row.judged if judgement for _, _, kind in judgement.marks}
    found = []
    if len(sheet.columns) > 1 and any("differs" in row.flags for row in rows):
        other = "the other answer" if len(sheet.columns) == 2 else f"the answer of {escaped(sheet.columns[0].label)}"
        found.append(("differs", "words", f"that {other} does not have there"))
    if "present" in kinds:
        found.append(("present", "words", "name something in the picture"))
    if "absent" in kinds:
        found.append(("absent", "words", "name something that is not there"))
    words = [word for row in rows for answer in row.said if answer is not None for word in answer.words]
    if any(word.probability is not None for word in words):
        listed = (f"under {LEVELS[0]:.0%}", *(f"{limit:.0%}" for limit in LEVELS[1:]))
        found += [
            (f"doubt-{level}", "words", f"were chosen with a probability {'' if level == 1 else 'under '}{said}")
            for level, said in enumerate(listed, start=1)
        ]
    if any(word.flagged for word in words):
        found.append(("flagged", "words", "name an object, were unsure and owe little to the picture"))
    if any(word.heat for word in words):
        found.append(("heated", "words", "show on the picture, under the pointer, what they owe to which part of it"))
    return found


def doubt(word: Word | None) -> str:
    """The class of a word that was chosen with a low probability; empty for others."""
    if word is None or word.probability is None:
        return ""
    level = bisect_right(LEVELS, word.probability) + 1
    return f"doubt-{level}" if level <= len(LEVELS) else ""


def _heated(card: Card) -> bool:
    return any(said is not None and said.grid[0] > 0 for row in card.rows for said in row.said)


def _card(card: Card, source: Source) -> dict[str, Any]:
    truths = {row.truth for row in card.rows}
    return {
        "picture": card.picture,
        "source": source,
        "truth": truths.pop() if len(truths) == 1 else "",
        "heated": _heated(card),
        "rows": [_row(row) for row in card.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    texts = [None if said is None or said.failed else said.text for said in row.said]
    judged = row.judged or (None,) * len(row.said)
    return {
        "prompt": row.prompt,
        "group": row.group,
        "flags": row.flags,
        "truth": row.truth,
        "said": row.said,
        "judged": judged,
        "pieces": [
            pieces(
                text or "",
                () if judgement is None else judgement.marks,
                differing,
                () if said is None else said.words,
            )
            for text, judgement, differing, said in zip(texts, judged, side_by_side(texts), row.said, strict=True)
        ],
    }


def _address(show: str, find: str, number: int) -> str:
    """Where the server has a part of the sheet."""
    asked = {"show": show, "find": find, "page": number if number > 1 else ""}
    return "?" + urlencode({name: value for name, value in asked.items() if value}, errors="replace")
