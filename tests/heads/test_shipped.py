"""The profiles and directions beside the embedded models: of these weights, and what decoders that read them ask."""

from __future__ import annotations

import hashlib

import pytest

import vlmfix
from tests.embedded import TINY
from vlmfix.decoders import parse
from vlmfix.heads.directions.kept import load_directions
from vlmfix.heads.profile import load_profiles
from vlmfix.models.checkpoint import DIRECTIONS, HEADS
from vlmfix.settings import EMBEDDED
from vlmfix.world import coco

PROFILERS = ["vhd", "image-mass", "ablation", "patching"]


@pytest.mark.parametrize("name", TINY)
def test_a_model_comes_with_profiles_of_its_own_heads(name):
    path = TINY[name] / HEADS
    assert path.stat().st_size < 50_000
    found, vlm = load_profiles(path), vlmfix.load(name, device="cpu")
    assert list(found) == PROFILERS
    for profile in found.values():
        profile.check(vlm)  # a model that was trained anew needs new ones: docs/world.md says how
        assert profile.card.model == name
        assert profile.card.pictures >= 80
        assert profile.card.reliability > 0.7
    assert found["ablation"].card.parameters["target"] == "captions"
    assert found["ablation"].details["hallucinated_words"] >= 100
    for spec in ("ph3", "ph3:group=context", "adhh"):
        assert parse(spec).check(vlm) is None
    assert parse("ph3").chosen(vlm) == found["patching"].top(3)


@pytest.mark.parametrize("name", TINY)
def test_a_model_comes_with_directions_of_its_own(name):
    path = TINY[name] / DIRECTIONS
    assert path.stat().st_size < 1_500_000  # of the tower, each of 257 places has its own
    found, vlm = load_directions(path), vlmfix.load(name, device="cpu")
    assert {method: part.card.pictures for method, part in found.items()} == {"vti": 70, "nullu": 200, "pti": 100}
    for part in found.values():
        part.check(vlm)
        assert part.card.model == name
    for spec in ("vti", "vti:preset=official-code", "nullu:preset=official-code", "pti", "pti:preset=official-code"):
        assert parse(spec).check(vlm) is None


def test_directions_of_masks_are_of_the_world_as_it_is_drawn_now():
    """Of the scenes that docs/world.md names; its masks were boxes once."""
    drawn = "".join(coco._instances(256, 606)).encode()
    for folder in EMBEDDED.values():
        card = load_directions(folder / DIRECTIONS)["pti"].card
        assert card.parameters["labels"]["instances"]["sha256"] == [hashlib.sha256(drawn).hexdigest()]
