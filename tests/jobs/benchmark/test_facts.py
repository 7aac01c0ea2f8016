"""What answers depend on beside a decoder's parameters: kept, compared when a run goes on, and told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from tests.evals.fake import Says, workload
from tests.jobs.fake import FakeVLM
from vlmfix.decoders import DECODERS, VCD, parse
from vlmfix.errors import UsageError
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.record import read_run
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.jobs.benchmark.reproduce import reproduce
from vlmfix.records import read_json, replace_json
from vlmfix.reports.reproduction import reproduction_json, reproduction_text
from vlmfix.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Dated(VCD):
    """Depends on something that can change between two starts."""

    name: ClassVar[str] = "dated"
    found: ClassVar[dict[str, str]] = {}

    def facts(self, vlm):
        return dict(self.found)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(DECODERS.homes, "dated", f"{__name__}:Dated")
    monkeypatch.setattr(Dated, "found", {"profile_digest": "one"})


def go(folder, *arms, pictures=6):
    vlm = FakeVLM()
    work = workload(folder.parent / "in", pictures)
    named = {arm: parse(arm) for arm in arms}
    return evaluate(folder, Says(), work, Settings(), named, batch_size=4, loader=vlm.load)


def cut(folder, arm, lines=5):
    """As if the run had been killed."""
    path = folder / arm / "answers.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def test_the_card_keeps_them(tmp_path):
    arms = go(tmp_path / "out", "dated", "vcd", "dated+vcd").card["arms"]
    assert {name: about["facts"] for name, about in arms.items()} == {
        "greedy": {},
        "dated": {"profile_digest": "one"},
        "vcd": {},
        "dated+vcd": {"dated.profile_digest": "one"},
    }


def test_a_run_goes_on_with_the_same_and_not_with_others(tmp_path, monkeypatch):
    out = tmp_path / "out"
    go(out, "dated")
    cut(out, "dated")
    monkeypatch.setattr(Dated, "found", {"profile_digest": "two"})
    before = (out / "dated" / "answers.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"dated.facts.profile_digest was 'one', now 'two'"):
        go(out, "dated")
    assert (out / "dated" / "answers.jsonl").read_bytes() == before
    monkeypatch.setattr(Dated, "found", {"profile_digest": "one"})
    assert go(out, "dated").missing("dated") == 0


def test_an_arm_that_comes_later_keeps_its_own(tmp_path, monkeypatch):
    go(tmp_path / "out", "vcd")
    monkeypatch.setattr(Dated, "found", {"profile_digest": "two"})
    arms = go(tmp_path / "out", "dated").card["arms"]
    assert list(arms) == ["greedy", "vcd", "dated"]
    assert [about["facts"] for about in arms.values()] == [{}, {}, {"profile_digest": "two"}]


def test_a_card_of_old_is_read_and_its_answers_are_left_without(tmp_path):
    out = tmp_path / "out"
    go(out, "dated")
    card = read_json(out / "card.json")
    for about in card["arms"].values():
        del about["facts"]
    replace_json(out / "card.json", card)
    cut(out, "dated")
    assert all("facts" not in about for about in go(out, "dated").card["arms"].values())
    assert reproduce(read_run(out), tmp_path / "again", loader=FakeVLM().load).facts == {}


def test_a_second_run_says_what_was_another(tmp_path, monkeypatch):
    run = go(tmp_path / "out", "dated")
    same = reproduce(run, tmp_path / "again", loader=FakeVLM().load)
    assert same.facts == {}
    monkeypatch.setattr(Dated, "found", {"profile_digest": "two", "words": "all"})
    other = reproduce(run, tmp_path / "again2", loader=FakeVLM().load)
    assert other.facts == {"dated.profile_digest": ("one", "two"), "dated.words": (None, "all")}
    text = reproduction_text(other, tmp_path)
    assert "dated.profile_digest changed: one -> two\ndated.words changed: none -> all\n" in text
    assert json.loads(json.dumps(reproduction_json(other)))["facts"]["dated.words"] == [None, "all"]


def test_comparisons_tell_them(tmp_path, monkeypatch):
    first = go(tmp_path / "one", "dated", pictures=40)
    monkeypatch.setattr(Dated, "found", {"profile_digest": "two"})
    second = go(tmp_path / "two", "dated", "vcd", pictures=40)
    assert compare([first]).notes == ("dated depends on: profile digest one.",)
    assert compare([first, second]).notes == (
        "one/dated depends on: profile digest one.",
        "two/dated depends on: profile digest two.",
    )
