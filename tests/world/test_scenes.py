import json
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from vlmfix.errors import DataError
from vlmfix.world import pope
from vlmfix.world.categories import DRAWN
from vlmfix.world.coco import objects
from vlmfix.world.contexts import CONTEXTS
from vlmfix.world.scenes import CANVAS, scene, visible_share
from vlmfix.world.sprites import SIZES, sprites

SCENES = [scene(0, index) for index in range(1500)]
ALL = [placed for drawn in SCENES for placed in drawn.objects]


def test_pure():
    assert scene(7, 3) == scene(7, 3)
    assert len({repr(scene(seed, index).objects) for seed in range(3) for index in range(3)}) == 9


def test_negative_index_is_refused():
    with pytest.raises(DataError, match="-1"):
        scene(0, -1)


@pytest.mark.parametrize("hashing", ["0", "1"])
def test_same_in_every_process(hashing: str):
    code = "from vlmfix.world.scenes import scene; print([scene(5, n) for n in range(8)])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hashing},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == repr([scene(5, n) for n in range(8)])


def test_numbers_of_objects():
    for drawn in SCENES:
        assert 4 <= len(drawn.objects) <= 9
        assert 3 <= len(drawn.counts()) <= 7
        assert sum(drawn.counts().values()) == len(drawn.objects)
    repeated = sum(max(drawn.counts().values()) > 1 for drawn in SCENES) / len(SCENES)
    assert 0.3 < repeated < 0.9


def test_counts_name_the_most_prominent_first():
    for drawn in SCENES[:100]:
        first = next(iter(drawn.counts()))
        areas = {
            placed: placed.visible * (placed.box[2] - placed.box[0]) * (placed.box[3] - placed.box[1])
            for placed in drawn.objects
        }
        assert max(areas, key=lambda placed: areas[placed]).category == first


def test_every_object_can_be_found():
    for placed in ALL:
        x0, y0, x1, y1 = placed.box
        assert 0 <= x0 < x1 <= CANVAS
        assert 0 <= y0 < y1 <= CANVAS
        assert 0.3 <= placed.visible <= 1.0
        assert max(sprites()[placed.sprite].drawn[placed.size]) >= 22
        assert placed.cover >= 90
        assert sprites()[placed.sprite].category == placed.category


def test_easy_and_hard_objects():
    longest = [max(sprites()[placed.sprite].drawn[placed.size]) for placed in ALL]
    share = Counter("large" if side >= 93 else "medium" if side >= 46 else "small" for side in longest)
    assert 0.35 < share["large"] / len(ALL) < 0.55
    assert 0.3 < share["medium"] / len(ALL) < 0.45
    assert 0.12 < share["small"] / len(ALL) < 0.28
    assert 0.1 < sum(placed.cover < 256 for placed in ALL) / len(ALL) < 0.2
    assert 0.05 < sum(placed.visible < 0.7 for placed in ALL) / len(ALL) < 0.35
    assert 0.04 < sum(max(placed.tint) < 140 for placed in ALL) / len(ALL) < 0.15
    assert {placed.size for placed in ALL} == set(range(len(SIZES)))


def test_all_contexts_and_categories_occur():
    assert {drawn.context for drawn in SCENES} == {context.name for context in CONTEXTS}
    assert {placed.category for placed in ALL} == {entry.name for entry in DRAWN}
    common = Counter(name for drawn in SCENES for name in drawn.counts())
    assert common.most_common(1)[0][0] == "person"
    assert 0.4 < common["person"] / len(SCENES) < 0.65


def test_categories_come_together_more_than_by_chance():
    single = Counter(name for drawn in SCENES for name in drawn.counts())
    pairs = Counter(pair for drawn in SCENES for pair in combinations(sorted(drawn.counts()), 2))
    lifts = {
        (first, second): number * len(SCENES) / (single[first] * single[second])
        for (first, second), number in pairs.items()
    }
    strong = sum(number for pair, number in pairs.items() if lifts[pair] > 2)
    assert strong / sum(pairs.values()) > 0.35
    assert lifts["keyboard", "laptop"] > 8
    assert lifts["fork", "knife"] > 5


def test_harder_negatives_fit_the_place_better():
    weights = {context.name: context.weights for context in CONTEXTS}
    places = {str(drawn.index): drawn.context for drawn in SCENES}
    pictures = pope.choose(((str(drawn.index), objects(drawn)) for drawn in SCENES), seed=0)
    fitting = {}
    for split in pope.SPLITS:
        entries = [json.loads(line) for line in pope.lines(pictures, split=split, seed=0)]
        negatives = [entry for entry in entries if entry["label"] == "no"]
        names = [entry["text"].split(maxsplit=3)[3].removesuffix(" in the image?") for entry in negatives]
        fitting[split] = sum(
            name in weights[places[entry["image"]]] for name, entry in zip(names, negatives, strict=True)
        ) / len(negatives)
    assert fitting["random"] < 0.25
    assert 0.5 < fitting["popular"] < fitting["adversarial"] - 0.05


@pytest.mark.parametrize("index", range(40))
def test_visible_counts_pixels(index: int):
    drawn = SCENES[index]
    for number, placed in enumerate(drawn.objects):
        x0, y0, x1, y1 = placed.box
        later = [other.box for other in drawn.objects[number + 1 :]]
        seen = sum(
            not any(a <= x < c and b <= y < d for a, b, c, d in later)
            for y in range(y0, y1, 1)
            for x in range(x0, x1, 1)
        )
        width, height = sprites()[placed.sprite].drawn[placed.size]
        assert placed.visible == pytest.approx(seen / (width * height))


def test_visible_share_of_overlapping_covers():
    full = (0, 0, 10, 10)
    assert visible_share(full, full, []) == 1.0
    assert visible_share((0, 0, 5, 10), full, []) == 0.5
    assert visible_share(full, full, [(0, 0, 5, 5), (0, 0, 5, 5), (4, 4, 20, 6)]) == 1 - (25 + 12 - 1) / 100
    assert visible_share(full, full, [(10, 0, 20, 10)]) == 1.0
    assert visible_share(full, full, [(-5, -5, 20, 20)]) == 0.0
