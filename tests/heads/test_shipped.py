"""The profiles beside the embedded models: of these weights, and what the decoders that read profiles ask for."""

from __future__ import annotations

import pytest

import vlmfix
from tests.embedded import TINY
from vlmfix.decoders import parse
from vlmfix.heads.profile import load_profiles
from vlmfix.models.checkpoint import HEADS

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
