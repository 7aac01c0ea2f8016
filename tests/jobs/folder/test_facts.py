"""What answers depend on beside a decoder's parameters, in the card of a folder of answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.fake import FakeVLM, draw
from vlmfix.errors import UsageError
from vlmfix.jobs.folder import Questions, run
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings


def go(folder: Path, count: int) -> dict[str, object]:
    """Runs gift over so many pictures; its card's settings."""
    pictures, what = draw(folder / "in", count), Questions.text("What?")
    run(
        pictures, folder / "out", questions=what, settings=Settings(decoder="gift"), batch_size=4, loader=FakeVLM().load
    )
    return read_json(folder / "out" / "run.json")["settings"]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    told(monkeypatch, "one")
    return monkeypatch


def told(patch: pytest.MonkeyPatch, rule: str) -> None:
    patch.setattr("vlmfix.decoders.attention.gift.rule_in_words", lambda _: rule)


def test_a_run_goes_on_with_the_same_and_not_with_others(tmp_path: Path, words: pytest.MonkeyPatch) -> None:
    assert go(tmp_path, 3)["decoder_facts"] == {"content_words": "one"}
    assert go(tmp_path, 4)["decoder_facts"] == {"content_words": "one"}
    told(words, "two")
    with pytest.raises(UsageError, match=r"decoder_facts.content_words was 'one', now 'two'"):
        go(tmp_path, 5)


def test_a_card_of_old_is_read_and_its_answers_are_left_without(tmp_path: Path, words: pytest.MonkeyPatch) -> None:
    go(tmp_path, 3)
    path = tmp_path / "out" / "run.json"
    card = read_json(path)
    del card["settings"]["decoder_facts"]
    replace_json(path, card)
    told(words, "two")
    assert "decoder_facts" not in go(tmp_path, 4)
    assert reproduce(tmp_path / "out", tmp_path / "again", loader=FakeVLM().load).facts == {}


def test_a_second_run_says_what_was_another(tmp_path: Path, words: pytest.MonkeyPatch) -> None:
    go(tmp_path, 3)
    told(words, "two")
    found = reproduce(tmp_path / "out", tmp_path / "again", loader=FakeVLM().load)
    assert found.facts == {"content_words": ("one", "two")}
    assert found.answers == 3
