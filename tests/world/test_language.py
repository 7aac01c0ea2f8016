"""Captions and words of the world: true where they must be, false as often as asked, and always good English."""

from __future__ import annotations

import random
import re

import pytest

from vlmfix.world.captions import absent, brief, caption, references
from vlmfix.world.categories import CATEGORIES
from vlmfix.world.language import one, place, several, toward
from vlmfix.world.mentions import mentions
from vlmfix.world.scenes import scene

SCENES = [scene(11, index) for index in range(120)]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


def test_mentions_knows_every_form_of_every_category() -> None:
    for entry in CATEGORIES:
        text = f"{one(entry.name)}, {several(entry.name, 2)} and {entry.plural.capitalize()}."
        assert mentions(text) == [entry.name] * 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Two hot dogs and a dog.", ["hot dog", "dog"]),
        ("A teddy bear beside bears, a teddy bear.", ["teddy bear", "bear", "teddy bear"]),
        ("Three people, two mice and a pair of skis.", ["person", "mouse", "skis"]),
        ("A catalogue of carpets and toasters.", ["toaster"]),
        ("A HOT DOG\non the bench", ["hot dog", "bench"]),
        ("", []),
    ],
)
def test_mentions(text: str, named: list[str]) -> None:
    assert mentions(text) == named


def test_references_are_true_complete_and_always_the_same() -> None:
    for view in SCENES:
        found = references(view)
        assert found == references(view)
        assert len(found) == 5
        assert set(mentions(found[0])) == set(view.counts())
        for text in found:
            assert set(mentions(text)) <= set(view.counts())
            for part in sentences(text):
                assert re.fullmatch(r"[A-Z][a-z ,]+\.", part), part
    assert len({text for view in SCENES for text in references(view)}) > 4.9 * len(SCENES)


def test_references_give_the_right_numbers() -> None:
    words = {"two": 2, "three": 3, "four": 4, "five": 5}
    for view in SCENES:
        for text in references(view):
            for word, name in re.findall(
                r"\b(two|three|four|five) ((?:pairs of |pieces of )?[a-z]+(?: [a-z]+)?)", text
            ):
                named = mentions(name)
                assert view.counts()[named[0]] == words[word], text


def test_captions_hallucinate_as_often_as_asked_and_late() -> None:
    rng = random.Random(0)
    clean = [caption(view, rng, hallucination=0, omission=0) for view in SCENES]
    assert all(set(mentions(text)) == set(view.counts()) for view, text in zip(SCENES, clean, strict=True))
    early = late = 0
    for view in SCENES:
        text = caption(view, rng, hallucination=1)
        false = [number for number, name in enumerate(mentions(text)) if name not in view.counts()]
        assert 1 <= len(false) <= 2
        early += false[0] < len(mentions(text)) / 2
        late += false[0] >= len(mentions(text)) / 2
        assert 2 <= len(sentences(text)) <= 4
    assert late > 2 * early


def test_what_is_invented_fits_the_context() -> None:
    rng = random.Random(0)
    for view in SCENES:
        names = absent(view, rng, 3)
        assert len(set(names)) == len(names)
        assert not set(names) & set(view.counts())
        assert len(sentences(brief(view, rng))) == 1


def test_places_and_sides() -> None:
    assert place((0, 0, 50, 50)) == "in the upper left corner"
    assert place((240, 240, 270, 270)) == "in the middle"
    assert place((240, 480, 270, 512)) == "at the bottom"
    assert toward((0, 0, 10, 10), (100, 20, 110, 30)) == "right"
    assert toward((0, 0, 10, 10), (20, 200, 30, 210)) == "below"
    assert toward((0, 0, 10, 10), (5, 5, 15, 15)) is None
