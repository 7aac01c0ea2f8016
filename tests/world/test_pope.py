import json
from collections import Counter

import pytest

from vlmfix.errors import DataError
from vlmfix.world.pope import SPLITS, choose, lines, question, statistics

PICTURES = [
    ("a.png", ["cup", "fork", "knife", "apple"]),
    ("b.png", ["cup", "fork", "car"]),
    ("c.png", ["car", "bus", "person"]),
    ("d.png", ["person", "cup", "orange"]),
]


def asked(split, pictures=PICTURES, **options):
    entries = [json.loads(line) for line in lines(pictures, split=split, seed=3, **options)]
    return [(entry["image"], entry["text"].split(maxsplit=3)[3][:-14], entry["label"]) for entry in entries]


def test_line_format():
    line = next(lines(PICTURES, split="popular", seed=0))
    assert line == '{"question_id": 1, "image": "a.png", "text": "Is there a cup in the image?", "label": "yes"}'


def test_articles():
    assert question("apple") == "Is there an apple in the image?"
    assert question("umbrella") == "Is there an umbrella in the image?"
    assert question("wine glass") == "Is there a wine glass in the image?"


def test_statistics():
    about = statistics(PICTURES)
    assert about.popular == ("cup", "fork", "car", "person", "knife", "apple", "bus", "orange")
    assert about.together["cup"] == ("fork", "knife", "apple", "car", "person", "orange")
    assert about.together["car"] == ("cup", "fork", "bus", "person")


@pytest.mark.parametrize("split", SPLITS)
def test_official_shape(split: str):
    found = asked(split)
    entries = [json.loads(line) for line in lines(PICTURES, split=split, seed=3)]
    assert [entry["question_id"] for entry in entries] == list(range(1, 25))
    assert [label for _, _, label in found] == ["yes", "no"] * 12
    for number, (image, objects) in enumerate(PICTURES):
        six = found[6 * number : 6 * number + 6]
        assert {name for name, _, _ in six} == {image}
        assert [name for _, name, label in six if label == "yes"] == objects[:3]
        absent = [name for _, name, label in six if label == "no"]
        assert not set(absent) & set(objects)
        assert len(set(absent)) == 3


def test_popular_takes_the_most_frequent_one_left():
    absent = [name for image, name, label in asked("popular") if label == "no"]
    assert absent[:6] == ["car", "person", "bus", "person", "knife", "apple"]
    assert absent[6:] == ["cup", "fork", "knife", "fork", "car", "knife"]


def test_adversarial_takes_what_comes_along_most():
    absent = [name for image, name, label in asked("adversarial") if label == "no"]
    # In a, cup meets car, person and orange once each: the first seen is asked. Fork meets nothing else that
    # is not in a, so anything may follow. In b, cup meets knife, fork meets apple, car meets bus.
    assert absent[0] == "car"
    assert absent[3:6] == ["knife", "apple", "bus"]
    assert absent[6] == "cup"


def test_random_draws_differ_with_the_seed_only():
    draws = {seed: list(lines(PICTURES, split="random", seed=seed)) for seed in range(5)}
    assert draws[1] == list(lines(PICTURES, split="random", seed=1))
    assert len({tuple(found) for found in draws.values()}) > 1
    wide = [(f"{n}.png", ["cup", "fork", "knife"]) for n in range(300)]
    wide.append(("other.png", ["car", "bus", "apple", "person"]))
    absent = Counter(name for _, name, label in asked("random", wide) if label == "no")
    assert set(absent) >= {"car", "bus", "apple", "person"}
    for name in ("car", "bus", "apple", "person"):
        assert 180 < absent[name] < 270  # three of four, drawn alike: 225 each


def test_few_pictures_need_further_names():
    one = PICTURES[:1]
    with pytest.raises(DataError, match=r"a\.png"):
        list(lines(one, split="random", seed=0))
    found = asked("adversarial", one, names=["dog", "cat", "cup", "bird"])
    assert {name for _, name, label in found if label == "no"} == {"dog", "cat", "bird"}


def test_unknown_split():
    with pytest.raises(DataError, match="'hard'"):
        list(lines(PICTURES, split="hard", seed=0))


def test_choose_keeps_pictures_with_three_objects():
    few = [("x.png", ["cup", "fork"]), *PICTURES]
    assert choose(few, seed=0) == PICTURES


def test_choose_draws_500_uniformly():
    many = [(f"{n}.png", ["cup", "fork", "car"]) for n in range(2000)]
    chosen = [name for name, _ in choose(iter(many), seed=0)]
    assert len(set(chosen)) == 500
    assert chosen == [name for name, _ in choose(many, seed=0)]
    assert chosen != [name for name, _ in choose(many, seed=1)]
    late = sum(int(name[:-4]) >= 1000 for name in chosen)
    assert 200 < late < 300
