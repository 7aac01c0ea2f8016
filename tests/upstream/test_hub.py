"""Which commit of the Hub a model is, and where its files lie, read from a cache of our own making."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.embedded import TINY
from vlmfix.generation import load
from vlmfix.upstream import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A Hub cache that holds ``some/tiny`` at one commit, which is its main branch."""
    home = tmp_path / "models--some--tiny"
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(TINY["tiny"], snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_model_of_the_hub_knows_its_commit_and_its_folder(cached):
    vlm = load("some/tiny", device="cpu")
    assert vlm.revision == COMMIT
    assert vlm.folder == cached


def test_a_directory_has_no_commit(tmp_path):
    assert hub.commit(str(tmp_path), None) is None
    assert hub.folder(str(tmp_path), None) == tmp_path


def test_what_is_not_in_the_cache_has_neither(cached):
    assert hub.commit("some/other", None) is None
    assert hub.folder("some/other", COMMIT) is None
    assert hub.folder("some/tiny", None) is None  # the main branch moves
    assert hub.folder("", COMMIT) is None
    assert huggingface_hub.constants.HF_HUB_OFFLINE
