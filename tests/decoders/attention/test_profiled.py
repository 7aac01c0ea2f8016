"""Finding, reading and checking the profiles that decoders read."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contracts.support import vlm_of
from tests.heads.made import made_profile
from tests.tiny import saved, tiny_vlm
from vlmfix.decoders.attention import profiled
from vlmfix.decoders.attention.profiled import profile_facts, profile_for, why_no_profile
from vlmfix.decoders.states.directed import directions_for
from vlmfix.errors import DataError, ProfileMismatchError
from vlmfix.heads.profile import HeadProfile, load_profiles, save_profiles
from vlmfix.models.checkpoint import HEADS, Checkpoint


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    return saved(tiny_vlm("llava"), tmp_path)


def test_without_a_name_the_file_beside_the_weights_is_read(stored: Path) -> None:
    vlm = Checkpoint.load(stored, device="cpu")
    assert vlm.folder == stored
    assert profile_for(vlm, "adhh", "ablation", None) is None
    written = made_profile(vlm, "ablation")
    written.save(stored / HEADS)
    found = profile_for(vlm, "adhh", "ablation", None)
    assert found is not None
    assert torch.equal(found.scores, written.scores)
    assert profile_for(vlm, "vhr", "vhd", None) is None


def test_a_model_without_a_folder_has_no_profile_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vlm = replace(tiny_vlm("llava"), name="llava")
    made_profile(vlm, "vhd").save(tmp_path / HEADS)
    monkeypatch.chdir(tmp_path)  # the working directory is no model's folder
    assert vlm.folder is None
    assert profile_for(vlm, "vhr", "vhd", None) is None
    reason = why_no_profile(vlm, "vhr", "vhd", None)
    assert reason is not None
    assert "vlmfix profile --model llava --profiler vhd" in reason
    assert profile_for(vlm, "vhr", "vhd", HEADS) is not None  # a relative name


def test_a_file_is_read_once_until_it_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vlm, path, reads = vlm_of("llava"), tmp_path / "made.safetensors", []
    profile = made_profile(vlm, "vhd")
    profile.save(path)

    def counted(file: Path) -> dict[str, HeadProfile]:
        reads.append(file)
        return load_profiles(file)

    monkeypatch.setattr(profiled, "load_profiles", counted)
    first = profile_for(vlm, "vhr", "vhd", str(path))
    assert profile_for(vlm_of("llava"), "other", "vhd", str(path)) is first
    replace(profile, scores=-profile.scores).save(path)
    os.utime(path, ns=(1, 1))
    second = profile_for(vlm, "vhr", "vhd", str(path))
    assert first is not None and second is not None  # noqa: PT018 (narrows both)
    assert torch.equal(second.scores, -first.scores)
    assert profile_for(vlm, "vhr", "vhd", str(path)) is second
    assert reads == [path, path]
    with pytest.raises(DataError, match="is no file of directions"):  # what was read as one thing is not another
        directions_for(vlm, "vti", str(path))


def test_another_models_profile_is_refused_every_time(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    made_profile(tiny_vlm("llava", seed=1), "vhd").save(path)
    for _ in range(2):
        with pytest.raises(ProfileMismatchError, match="measured on"):
            profile_for(vlm_of("llava"), "vhr", "vhd", str(path))
    assert "measured on" in (why_no_profile(vlm_of("llava"), "vhr", "vhd", str(path)) or "")


@pytest.mark.parametrize("content", [None, b"", b"no profile"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "made.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)) as caught:
        profile_for(vlm_of("llava"), "vhr", "vhd", str(path))
    assert "vlmfix profile" in caught.value.hint


def test_a_named_file_must_hold_the_profile(tmp_path: Path) -> None:
    vlm, path = vlm_of("llava"), tmp_path / "made.safetensors"
    save_profiles({name: made_profile(vlm, name) for name in ("vhd", "saliency")}, path)
    with pytest.raises(DataError, match=r"adhh reads the profile ablation, and .* holds vhd, saliency"):
        profile_for(vlm, "adhh", "ablation", str(path))


def test_facts_name_the_profile_by_its_scores(tmp_path: Path) -> None:
    vlm, path = vlm_of("llava"), tmp_path / "made.safetensors"
    profile = made_profile(vlm, "vhd")
    profile.save(path)
    digest = hashlib.sha256(struct.pack("<24f", *profile.scores.flatten().tolist())).hexdigest()
    facts = profile_facts(vlm, "vhr", "vhd", str(path))
    assert facts == {"profile": "vhd in made.safetensors", "profile_digest": f"sha256:{digest}"}
    save_profiles({"saliency": made_profile(vlm, "saliency"), "vhd": profile}, path)
    assert profile_facts(vlm, "vhr", "vhd", str(path)) == facts
    replace(profile, scores=profile.scores + 1).save(path)
    assert profile_facts(vlm, "vhr", "vhd", str(path)) != facts
    assert profile_facts(vlm, "vhr", "vhd", None) == {}
