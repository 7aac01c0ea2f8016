"""Captions and questions: true where they must be, false as often as asked, and always good English."""

from __future__ import annotations

import random
import re

import pytest

from vlmfix.world.batches import mirror
from vlmfix.world.captions import absent, brief, caption, references
from vlmfix.world.categories import CATEGORIES
from vlmfix.world.language import alone, one, place, several, toward
from vlmfix.world.mentions import mentions
from vlmfix.world.questions import (
    Diet,
    ask_beside,
    beside_any,
    beside_exchanges,
    blind_exchanges,
    count_exchange,
    exchanges,
    exists_question,
    where_exchange,
    window,
    zoom,
)
from vlmfix.world.scenes import scene

SCENES = [scene(11, index) for index in range(120)]


def _other_side(found: re.Match[str]) -> str:
    return {"left": "right", "right": "left"}[found[0]]


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


def test_questions_have_true_answers() -> None:
    rng = random.Random(1)
    kinds = set()
    for view in SCENES:
        for entry in exchanges(view, rng, Diet()):
            kinds.add(entry.kind)
            if entry.kind == "exists" and entry.subject:
                assert entry.answer.startswith("Yes" if entry.subject in view.counts() else "No")
            elif entry.kind == "count" and entry.subject in view.counts():
                number = several(entry.subject, view.counts()[entry.subject]).split()[0]
                assert entry.answer.lower().split(" ")[0] in (number, "one", "there")
    assert kinds == {"describe", "brief", "exists", "unheard", "count", "where", "beside"}


def test_yes_and_no_are_balanced_and_a_coin_without_a_picture() -> None:
    rng = random.Random(2)
    seen = [e for view in SCENES for e in exchanges(view, rng, Diet()) if e.kind == "exists"]
    assert 0.4 < sum(e.answer.startswith("Yes") for e in seen) / len(seen) < 0.6
    blind = [e for view in SCENES for e in blind_exchanges(view, rng, Diet()) if e.kind == "exists" and e.prompt]
    assert 0.44 < sum(e.answer.startswith("Yes") for e in blind) / len(blind) < 0.64


def test_official_wording() -> None:
    assert exists_question("umbrella") == "Is there an umbrella in the image?"
    assert exists_question("hot dog") == "Is there a hot dog in the image?"


@pytest.mark.parametrize(
    ("name", "count", "answer"),
    [
        ("cup", 1, "There is one cup in the image."),
        ("umbrella", 1, "There is one umbrella in the image."),
        ("scissors", 1, "There is one pair of scissors in the image."),
        ("skis", 2, "There are two pairs of skis in the image."),
        ("person", 0, "There are no people in the image."),
        ("broccoli", 3, "There are three pieces of broccoli in the image."),
    ],
)
def test_counting(name: str, count: int, answer: str) -> None:
    assert count_exchange(name, count).answer == answer


def test_places_and_sides() -> None:
    assert place((0, 0, 50, 50)) == "in the upper left corner"
    assert place((240, 240, 270, 270)) == "in the middle"
    assert place((240, 480, 270, 512)) == "at the bottom"
    assert toward((0, 0, 10, 10), (100, 20, 110, 30)) == "right"
    assert toward((0, 0, 10, 10), (20, 200, 30, 210)) == "below"
    assert toward((0, 0, 10, 10), (5, 5, 15, 15)) is None


def test_neighbours_are_on_the_side_that_is_asked_for() -> None:
    for view in SCENES:
        for entry in beside_exchanges(view):
            near = beside_any(view, entry)
            named = mentions(entry.answer)[0]
            assert named in near if near else entry.answer.startswith("Nothing")
        entry = ask_beside(view, random.Random(0))
        assert entry is None or entry.subject in alone(view)


def test_a_mirrored_scene_swaps_left_and_right() -> None:
    for view in SCENES[:20]:
        for name, thing in alone(view).items():
            turned = alone(mirror(view))[name]
            told = where_exchange(turned).answer
            assert where_exchange(thing).answer == re.sub("left|right", _other_side, told)


def test_the_enlarged_part_holds_its_object() -> None:
    for view in SCENES:
        (x0, y0, x1, y1), name = zoom(view)
        assert 0 <= x0 < x1 <= 512
        assert x1 - x0 == y1 - y0 >= 96
        middles = [((t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2) for t in view.objects if t.category == name]
        assert any(x0 <= x <= x1 and y0 <= y <= y1 for x, y in middles)
    assert window((500, 500, 512, 512), 0.0, 0.0, 0.0) == (416, 416, 512, 512)
