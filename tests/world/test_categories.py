import pytest
from PIL import Image

from vlmfix.errors import DataError
from vlmfix.world.categories import CATEGORIES, DRAWN, category
from vlmfix.world.contexts import CONTEXTS
from vlmfix.world.sprites import ASSETS, SIZES, pictures, resample, sprites, sprites_of


def test_coco_numbers():
    assert len(CATEGORIES) == 80
    assert [entry.id for entry in CATEGORIES] == sorted({entry.id for entry in CATEGORIES})
    missing = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert {entry.id for entry in CATEGORIES} == set(range(1, 91)) - missing
    assert category("dining table").id == 67
    assert category("toothbrush").id == 90
    assert category("sheep").plural == "sheep"
    assert category("person").supercategory == "person"


def test_drawn():
    assert len(DRAWN) == 67
    assert all(entry.glyph for entry in DRAWN)
    assert category("bench").glyph is None
    assert set(sprites_of()) == {entry.name for entry in DRAWN}


def test_unknown_category_lists_the_names():
    with pytest.raises(DataError, match=r"'dragon'.*toothbrush"):
        category("dragon")


def test_every_drawn_category_has_a_place():
    used = set().union(*(context.weights for context in CONTEXTS))
    assert used == {entry.name for entry in DRAWN}
    assert all(weight > 0 for context in CONTEXTS for weight in context.weights.values())


def test_sheet_is_small_and_has_its_licence():
    assert (ASSETS / "sprites.png").stat().st_size < 1_500_000
    licence = (ASSETS / "OFL.txt").read_text(encoding="utf-8")
    for words in (
        "SIL OPEN FONT LICENSE Version 1.1",
        "PERMISSION & CONDITIONS",
        "TERMINATION",
        "DISCLAIMER",
    ):
        assert words in licence


def test_cells_are_tight_and_apart():
    with Image.open(ASSETS / "sprites.png") as sheet:
        width, height = sheet.size
    for sprite, picture in zip(sprites(), pictures(), strict=True):
        x0, y0, x1, y1 = sprite.box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        alpha = picture[..., 3]
        for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert edge.any(), sprite.category


@pytest.mark.parametrize("size", range(0, len(SIZES), 4))
def test_index_knows_the_drawn_sizes(size: int):
    for sprite, picture in zip(sprites(), pictures(), strict=True):
        drawn = resample(picture, SIZES[size])
        assert drawn.shape[1::-1] == sprite.drawn[size], sprite.category
        assert max(drawn.shape) <= SIZES[size]
