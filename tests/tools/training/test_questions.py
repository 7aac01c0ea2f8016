"""Questions and their answers: true, balanced as asked, and in good English."""

from __future__ import annotations

import random
import re

import pytest

from tools.training.batches import mirror
from tools.training.questions import (
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
from vlmfix.world.language import alone, several
from vlmfix.world.mentions import mentions
from vlmfix.world.scenes import scene

SCENES = [scene(11, index) for index in range(120)]


def _other_side(found: re.Match[str]) -> str:
    return {"left": "right", "right": "left"}[found[0]]


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
