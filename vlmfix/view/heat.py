"""Measures what each word of an answer owes to which part of its picture, by the model that the answer's card names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlmfix.answering import is_memory
from vlmfix.card import settings_again
from vlmfix.decoding.spelling import Spelling, spelled, words_of
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.generation import VLM, load
from vlmfix.insight.grounding import Grounding, grounding
from vlmfix.jobs.folder.reproduce import FINISHED
from vlmfix.jobs.lines import CARD
from vlmfix.parsing import is_text
from vlmfix.records import read_json
from vlmfix.settings import Settings, decoding_in
from vlmfix.view.page import embedded, page
from vlmfix.view.pictures import originals, small
from vlmfix.view.sheet import Card, Column, PictureFile, Row, Said, Sheet, Word

LONGER_SIDE = 16
"""Cells of a map; a model sees a picture in some hundred patches, and a page holds a map for every word."""
TOGETHER = 8
"""Answers that are measured at once."""


class Answered(NamedTuple):
    """Holds what one answer is about, and its text."""

    picture: Image.Image
    prompt: str
    text: str


class Heat:
    """Gives words their maps; models are loaded when they are first needed, and kept.

    Args:
        columns: The columns of the sheet.
        model: Directory of the model; None for where the cards say.
        loader: Loads a model.

    Attributes:
        report: Called with the pictures that are done, and their number.

    Raises:
        UsageError: A column is none of ``vlmfix run``.
        DataError: A model is not there any more, or is another.
    """

    def __init__(
        self, columns: Sequence[Column], *, model: str | None = None, loader: Callable[..., VLM] = load
    ) -> None:
        self._loader = loader
        self.report: Callable[[int, int], None] = lambda done, total: None
        self._models: dict[tuple[Any, ...], VLM] = {}
        self._settings = [_settings(column, model) for column in columns]

    def __call__(self, cards: Iterable[Card]) -> list[Card]:
        """Returns the cards with maps for every word whose picture is there; answers without a map stay as they are."""
        cards = list(cards)
        pictures = originals(card.picture for card in cards if card.picture is not None)
        heated = []
        for card in cards:
            heated.append(card if card.picture is None else self._heated(card, next(pictures)))
            self.report(len(heated), len(cards))
        return heated

    def _heated(self, card: Card, picture: Image.Image | None) -> Card:
        if picture is None:
            return card
        rows = [list(row.said) for row in card.rows]
        for column, settings in enumerate(self._settings):
            asked = [
                (place, row.prompt, said)
                for place, row in enumerate(card.rows)
                if (said := row.said[column]) is not None and said.text and is_text(said.text) and not said.failed
            ]
            if asked:
                vlm = self._model(settings)
                found = measured(
                    vlm, [Answered(picture, prompt, said.text) for _, prompt, said in asked], system=settings.system
                )
                for (place, _, said), heats in zip(asked, found, strict=True):
                    rows[place][column] = said if heats is None else with_heat(said, *heats)
        return Card(card.picture, tuple(_row(row, said) for row, said in zip(card.rows, rows, strict=True)))

    def _model(self, settings: Settings) -> VLM:
        key = (settings.model, *settings.loading().values())
        if key not in self._models:
            self._models[key] = self._loader(settings.model, **settings.loading())
        return self._models[key]


def _row(row: Row, said: Sequence[Said | None]) -> Row:
    return replace(row, said=tuple(said))


def _settings(column: Column, model: str | None) -> Settings:
    """The settings with which a column's answers were made."""
    if column.folder is None or not os.path.exists(column.folder / CARD):
        raise UsageError(
            f"{column.label} was not made by vlmfix run, and no card says how", "leave --grounding out for it"
        )
    card: Mapping[str, Any] = read_json(column.folder / CARD, FINISHED)["settings"]
    return settings_again(str(column.folder), card, decoding_in(card), model=model, device="auto")


Heats = tuple[list[tuple[int, int, str]], tuple[int, int]]
"""Begin, end and map of each word, and the columns and rows of the maps."""


def measured(vlm: VLM, asked: Sequence[Answered], *, system: str | None = None) -> list[Heats | None]:
    """Measures what the words of answers owe to the parts of their pictures.

    Args:
        vlm: The model.
        asked: The answers.
        system: System message of all.

    Returns:
        The maps of each; None where an answer cannot be measured: it is too long, or its tokens spell something else.
    """
    found: list[Heats | None] = []
    for begin in range(0, len(asked), TOGETHER):
        part = asked[begin : begin + TOGETHER]
        try:
            found += _together(vlm, part, system)
        except Exception as error:
            if not isinstance(error, VlmfixError) and not is_memory(error):
                raise
            found += [heat for one in part for heat in _alone(vlm, one, system)]
    return found


def _alone(vlm: VLM, one: Answered, system: str | None) -> list[Heats | None]:
    try:
        return list(_together(vlm, [one], system))
    except DataError:  # of this answer alone
        return [None]


def _together(
    vlm: VLM, asked: Sequence[Answered], system: str | None, *, drop_sinks: bool = False
) -> Iterator[Heats | None]:
    pictures, prompts = [one.picture for one in asked], [one.prompt for one in asked]
    answers = [one.text for one in asked]
    layout = vlm.layout(vlm.encode(prompts, pictures, system=system))
    length = layout.tokens.shape[1]
    every = grounding(vlm, pictures, prompts, answers, system=system, drop_sinks=drop_sinks)
    for row, (picture, text, scores) in enumerate(zip(pictures, answers, every, strict=True)):
        scale = LONGER_SIDE / max(picture.size)
        columns, rows = (max(1, round(side * scale)) for side in picture.size)
        maps = [layout.heatmap(one[:length], row=row, image=0, size=(rows, columns)) for one in scores.rows]
        yield _by_words(vlm, text, scores, maps, (columns, rows))


def _by_words(vlm: VLM, text: str, scores: Grounding, maps: Sequence[Tensor], grid: tuple[int, int]) -> Heats | None:
    """Joins the maps of tokens to those of words, in sixteen steps up to the hottest spot of the answer."""
    spelling = spelled(Spelling(vlm.processor.tokenizer, ()), scores.tokens)
    if spelling.text != text:
        return None
    words = [
        (begin, end, torch.stack([maps[token] for token in own]).mean(dim=0))
        for begin, end, own in words_of(text, spelling.starts)
        if own
    ]
    hottest = max((float(heat.max()) for *_, heat in words), default=0.0) or 1.0
    return [(begin, end, _digits(heat / hottest)) for begin, end, heat in words], grid


def _digits(heat: Tensor) -> str:
    """(rows, columns) values in [0, 1] as hexadecimal digits."""
    return "".join(f"{step:x}" for step in (15 * heat.clamp(0, 1)).round().int().flatten().tolist())


def with_heat(said: Said, words: Sequence[tuple[int, int, str]], grid: tuple[int, int]) -> Said:
    """Returns an answer whose words have maps, beside what is known of them already."""
    known = {(word.begin, word.end): word for word in said.words}
    heated = (replace(known.get((begin, end), Word(begin, end)), heat=heat) for begin, end, heat in words)
    return replace(said, grid=grid, words=tuple(heated))


def grounding_page(
    vlm: VLM,
    picture: Image.Image,
    name: str,
    question: str,
    answer: str,
    decoder: str,
    page_name: str,
    *,
    drop_sinks: bool = False,
) -> str:
    """Makes a page of one answer, with maps.

    Args:
        vlm: The model that is asked.
        picture: The picture.
        name: What it is called.
        question: The question.
        answer: The answer.
        decoder: Who gave it, in words.
        page_name: The command that makes the page.
        drop_sinks: Whether maps leave sinks out; see ``grounding``.

    Raises:
        DataError: The answer cannot be measured.
    """
    (found,) = _together(vlm, [Answered(picture, question, answer)], None, drop_sinks=drop_sinks)
    if found is None:
        raise DataError("the answer's tokens spell something else than the answer", "give another --answer")
    said = with_heat(Said(answer), *found)
    shown = Card(PictureFile(name, None), (Row(question, (said,)),))
    sheet = Sheet("", (Column(decoder, {"model": vlm.name, "decoder": decoder}),), (shown,))
    source = embedded(small(picture))
    heading = "What each word owes to which part of the picture"
    return page(sheet, [(shown, source)], name=page_name, heading=heading)
