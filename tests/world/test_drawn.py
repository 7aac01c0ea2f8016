"""Pictures of this world are told from others."""

from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from vlmfix.world.coco import make
from vlmfix.world.drawn import is_drawn


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    make(tmp_path / "w", count=1, seed=3)
    return tmp_path / "w" / "images" / "000000000000.png"


def test_a_drawn_picture_is_known_by_size_and_colours(drawn):
    assert is_drawn(drawn)
    with Image.open(drawn) as picture:
        picture.crop((0, 0, 512, 511)).save(drawn)
    assert not is_drawn(drawn)


def test_a_photograph_is_not_one(tmp_path):
    noise = Image.frombytes("RGB", (512, 512), bytes(value * 7919 % 251 for value in range(512 * 512 * 3)))
    many = Image.effect_noise((512, 512), 80)
    Image.merge("RGB", (noise.getchannel(0), many, many.rotate(90))).save(tmp_path / "a.png")
    assert not is_drawn(tmp_path / "a.png")
    Image.new("RGB", (512, 512)).save(tmp_path / "a.jpg")
    assert not is_drawn(tmp_path / "a.jpg")


def test_what_is_no_picture_raises(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(UnidentifiedImageError):
        is_drawn(tmp_path / "a.png")
