"""The objects that CHAIR sees: published vectors for the original table, our own sentences for ours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.words import Words, original_words, own_words, read_synonyms, tokens, words_of
from vlmfix.world.captions import references
from vlmfix.world.categories import CATEGORIES
from vlmfix.world.mentions import mentions
from vlmfix.world.scenes import scene

ORIGINAL = Path(__file__).parents[3] / "shared" / "data" / "chair_vocabulary.md"

# caption: what the pattern version finds, "word" or "word=node word"
PUBLISHED = {
    "Two buses and a bus wait near the traffic lights.": "bus, traffic light",
    "She sits on the toilet seat next to a chair.": "toilet, chair",
    "The seat of the toilet is up and a stool stands nearby.": "toilet, stool=chair",
    "A man in a bow tie holds two wine glasses and a wine glass.": "man=person, tie, wine glass, wine glass",
    "Ties and skis hang by the skiers.": "ski=skis, skier=person",
    "A motor bike, a motor cycle and a motorbike.": "motor cycle=motorcycle, motorbike=motorcycle",
    "A cheesecake, cupcakes and pancakes on plates.": "cupcake=cake, pancake=cake",
    "An iPhone and two cell phones lie on a dining table.": "cell phone, table=dining table",
    "A stove top oven beside a hair dryer and a hair drier.": "stove=oven, oven, hair drier",
    "Passenger trains pass a train track; a baby elephant follows.": "train, elephant",
    "A tennis racket, a baseball bat and sports balls.": "racket=tennis racket, baseball bat, ball=sports ball",
    "Four people's dogs chase geese, mice, calves and a child's kite.": (
        "person, dog, goose=bird, mouse, calf=cow, child=person, kite"
    ),
    "The couches, settees and teddy bears were seated.": "couch, settee=couch, teddy bear",
    "An orange cat eats oranges by the computer mouse.": "orange, cat, orange, computer=laptop, mouse",
    "The dogs' bowls are full of hot dogs. Knives, canoes, collies.": "dog, bowl, hot dog, knife",
}

# a table for the rules alone: a few rows in the original's format, accidents included
SMALL = """
person, man, child, skier
bus, minibus
airplane, airbus
motorcycle,  motor bike, motor cycle, motorbike
traffic light
train
elephant
dog, collie, doggie
hot dog
tie, bow tie
skis, ski
wine glass
chair, seat, stool
toilet
knife
boat, canoe
dining table, table
tennis racket, racket
sports ball, ball
cell phone, iPhone
"""
BY_RULE = {
    "Two buses and a bus wait near the traffic lights.": "bus, traffic light",
    "Minibuses and airbuses.": "minibus=bus, airbus=airplane",
    "She sits on the toilet seat next to a chair.": "toilet, chair",
    "The seat of the toilet is up and a stool stands nearby.": "toilet, stool=chair",
    "A seat and a stool.": "seat=chair, stool=chair",
    "A man in a bow tie holds two wine glasses and a wine glass.": "man=person, tie, wine glass, wine glass",
    "Ties and skis hang by the skiers.": "ski=skis, skier=person",
    "A motor bike, a motor cycle and a motorbike.": "motor cycle=motorcycle, motorbike=motorcycle",
    "An iPhone and two cell phones lie on a dining table.": "cell phone, table=dining table",
    "Passenger trains pass a train track; a baby elephant follows.": "train, elephant",
    "A tennis racket and sports balls.": "racket=tennis racket, ball=sports ball",
    "The children's dogs eat hot dogs. Knives, canoes, collies, doggies.": "child=person, dog, hot dog, knife",
    "The dogs lie on the table.Two more do not.": "dog",  # no blank, so no sentence ends: as the original has it
}

OWN = {
    "Two buses and a bus wait near the traffic lights.": "bus, bus, traffic light",
    "She sits on the toilet seat next to a chair.": "toilet seat=toilet, chair",
    "A man in a bow tie holds two wine glasses and a wine glass.": "man=person, bow tie=tie, wine glass, wine glass",
    "Ties and skis hang by the skiers.": "tie, skis, skier=person",
    "A ski lift and two jet skis.": "",
    "A motor bike and a motorbike.": "motor bike=motorcycle, motorbike=motorcycle",
    "An iPhone and two cell phones lie on a dining table.": "iphone=cell phone, cell phone, dining table",
    "A hair dryer and a hair drier.": "hair dryer=hair drier, hair drier",
    "Passenger trains pass a train track; a baby elephant follows.": "passenger train=train, elephant",
    "Four people's dogs chase geese, mice, calves and a child's kite.": (
        "person, dog, goose=bird, mouse, calf=cow, child=person, kite"
    ),
    "The couches, settees and teddy bears were seated.": "couch, settee=couch, teddy bear",
    "The dogs' bowls are full of hot dogs. Knives, canoes, collies.": (
        "dog, bowl, hot dog, knife, canoe=boat, collie=dog"
    ),
    "A computer mouse beside a mouse pad and a computer.": "computer mouse=mouse",
    "A teddy bear and a polar bear.": "teddy bear, polar bear=bear",
    "Toilet paper, a toaster oven and a bus stop.": "",
    "A dog bed and a bed.": "bed",
    "**Dogs**: two. *Cat*.": "dog, cat",
    "The catcher's mitt is on the bench.": "catcher's mitt=baseball glove, bench",
    # plurals
    "Two persons and three computer mouses.": "person, computer mouse=mouse",
    "Aircrafts over sheeps, luggages and broccolis.": "aircraft=airplane, sheep, luggage=suitcase, broccoli",
    # hyphens: between the words of an entry, within a word, at the end of a line, and of any kind
    "A teddy-bear by the fire-hydrant.": "teddy bear, fire hydrant",
    "Hot-dogs, Traffic-Lights, a STOP-SIGN and a cell-phone.": "hot dog, traffic light, stop sign, cell phone",
    "A baseball-bat, a tooth-brush, a snow-board and a sky-blue bi-plane.": (
        "baseball bat, tooth brush=toothbrush, snow board=snowboard, biplane=airplane"
    ),
    "A computer-mouse, a golden-retriever and a baby-elephant.": "computer mouse=mouse, golden retriever=dog, elephant",
    "A teddy\u2010bear, a teddy\u2011bear, a teddy\u2013bear, a teddy\u00adbear, a hy\u00addrant.": (
        "teddy bear, teddy bear, teddy bear, teddy bear, hydrant=fire hydrant"
    ),
    "A fire-\nhydrant and a traffic\n light; a wine_glass.": "fire hydrant, traffic light, wine glass",
    "A teddy-bear's nose, the fire-hydrants' paint.": "teddy bear, fire hydrant",
    "**Teddy-bear**: *traffic-light*, _kite_, `fire-hydrant` and 'dogs'.": (
        "teddy bear, traffic light, kite, fire hydrant, dog"
    ),
    # what hyphens join is not each of the words by itself
    "A dog-friendly, man-made, cat-like, two-person, chair-shaped thing.": "",
    "Toilet-paper, a bus-stop, a dog-bed, a table-lamp and a bird-feeder.": "",
    "A train-station with a mouse-pad and a book-shelf.": "",
    # apostrophes
    "The catcher\u2019s mitt, the child\u2019s kite, the dogs\u2019 bowls.": (
        "catcher's mitt=baseball glove, child=person, kite, dog, bowl"
    ),
    "\u2018Dogs\u2019 and \u201ccats\u201d, a man's tie, the men's ties.": "dog, cat, man=person, tie, man=person, tie",
    # what parts words without a blank
    "A dog\u2014a cat\u2014and a couch/sofa\u2026birds|kites": "dog, cat, couch, sofa=couch, bird, kite",
    "A dog--a cat, a bus\u2013a train, a cup+fork.": "dog, cat, bus, train, cup, fork",
    # orange
    "An orange cat eats oranges.": "cat, orange",
    "There is an orange in the corner.": "orange",
    "A dog, an orange and a cat.": "dog, orange, cat",
    "An orange and white cat.": "cat",
    "The wall is orange. It is a bright orange.": "",
    "A glass of orange juice.": "",
    "She peels an orange": "orange",
}


def expected(text: str) -> list[tuple[str, str]]:
    found = [part.strip().split("=") for part in text.split(",") if part.strip()]
    return [(part[0], part[-1]) for part in found]


def found(words: Words, text: str) -> list[tuple[str, str]]:
    return [(mention.word, mention.node) for mention in words.read(text).mentions]


@pytest.fixture(scope="module")
def original() -> Words:
    if not ORIGINAL.exists():
        pytest.skip("the original word table is not beside the repository")
    rows = []
    for line in ORIGINAL.read_text(encoding="utf-8").split("```")[1].strip().splitlines():
        name, _, rest = line.partition(": ")
        entries = [] if rest.startswith("(") else [entry.strip().replace("␠", " ") for entry in rest.split(";")]
        rows.append(", ".join([name, *entries]))
    return original_words("\n".join(rows))


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_vectors(original: Words, text: str) -> None:
    assert found(original, text) == expected(PUBLISHED[text])


def test_the_original_has_every_category_and_pair(original: Words) -> None:
    assert set(original.nodes.values()) == {category.name for category in CATEGORIES}
    assert len(original.phrases) == 54  # 55 entries upstream, one of three words, which never matches


@pytest.mark.parametrize("text", BY_RULE)
def test_the_pattern_rules(text: str) -> None:
    assert found(original_words(SMALL), text) == expected(BY_RULE[text])


@pytest.mark.parametrize("text", OWN)
def test_our_own_table(text: str) -> None:
    assert found(own_words(), text) == expected(OWN[text])


def test_our_table_has_every_category_in_both_numbers() -> None:
    for category in CATEGORIES:
        if category.name != "orange":
            for name in (category.name, category.plural):
                assert found(own_words(), f"Here: {name}.") == [(category.name, category.name)]
    assert found(own_words(), "two oranges") == [("orange", "orange")]


def test_our_table_reads_the_drawn_world() -> None:
    for index in range(40):
        for text in references(scene(5, index), 5):
            assert [node for _, node in found(own_words(), text)] == mentions(text)


def test_words_stand_where_they_are_written() -> None:
    text = 'İki "Puppies", he said.  Then A  Hot\nDog.'
    read = own_words().read(text).mentions
    assert [(text[m.start : m.end], m.node, m.sentence) for m in read] == [
        ("Puppies", "dog", 0),
        ("Hot\nDog", "hot dog", 1),
    ]


def test_joined_words_stand_where_they_are_written() -> None:
    text = "Zwei \u2018Teddy\u2011Bears\u2019\u2014a child\u2019s Fire-\nHydrant."
    read = own_words().read(text).mentions
    assert [text[m.start : m.end] for m in read] == ["Teddy\u2011Bears", "child", "Fire-\nHydrant"]


@pytest.mark.parametrize("text", ["two persons", "a teddy-bear", "the traffic-lights", "a dog/cat", "the child\u2019s"])
def test_the_original_joins_and_parts_nothing(text: str) -> None:
    """Its figures are compared with those of papers, so it reads what its authors' code reads."""
    seen = [mention.word for mention in original_words(SMALL + "teddy bear\ncat\n").read(text).mentions]
    assert seen == {"two persons": ["person"], "the child\u2019s": ["child"]}.get(text, [])


def test_length_counts_phrases_once_and_keeps_the_toilets_seat() -> None:
    words = original_words(SMALL)
    assert words.read("A traffic light.").tokens == 3
    assert words.read("The seat of the toilet.").tokens == 6


def test_tokens_cover_any_text() -> None:
    pieces = [
        "can't",
        "cannot ",
        "gimme ",
        "...",
        "''",
        "``",
        '"',
        "\u2019",
        "dog",
        "İß",
        " ",
        ".",
        ",",
        "*",
        "(",
        "\n",
        "?",
    ]
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=12))
        parts = tokens(text)
        for token in parts:
            assert text[token.start : token.end].lower() in (token.text, '"', "''")
        covered = {at for token in parts for at in range(token.start, token.end)}
        assert all(text[at].isspace() for at in range(len(text)) if at not in covered)


@pytest.mark.parametrize(("text", "problem"), [("\n \n", "is empty"), ("dog, pup\ncat, pup", "'pup'")])
def test_a_broken_table_is_refused(text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        original_words(text)


def test_a_table_needs_no_blanks_after_commas() -> None:
    assert original_words("dog,pup").nodes == original_words("dog, pup").nodes == {"dog": "dog", "pup": "dog"}


def test_a_table_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text(SMALL)
    assert words_of(read_synonyms(path)).nodes["stool"] == "chair"
    path.write_text("")
    with pytest.raises(DataError, match=r"synonyms\.txt: the table of synonyms is empty"):
        read_synonyms(path)
    with pytest.raises(DataError, match=r"cannot read .*none"):
        read_synonyms(tmp_path / "none")


def test_without_a_table_our_own() -> None:
    assert words_of(None) is own_words()
