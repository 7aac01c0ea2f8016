"""What runs over pictures and over benchmarks share: the age of the card, and which files are written again."""

from __future__ import annotations

import pytest

from tests.evals.fake import Says, workload
from tests.jobs.fake import FakeVLM, colour, draw
from vlmfix.decoders import parse
from vlmfix.jobs import ledger
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.jobs.folder import Questions, run
from vlmfix.records import read_json
from vlmfix.settings import Settings


def ask(base, vlm, **more):
    questions = Questions.text("What?")
    return run(draw(base / "in", 6), base / "out", questions=questions, settings=Settings(), loader=vlm.load, **more)


def ask_arms(base, vlm, **more):
    arms = {"vcd": parse("vcd")}
    return evaluate(base / "out", Says(), workload(base / "in"), Settings(), arms, loader=vlm.load, **more)


@pytest.mark.parametrize(("seconds", "known"), [(30.0, [0, 0, 0, 0]), (0.0, [0, 2, 4, 6])])
def test_the_card_of_a_run_is_as_old_as_it_may_be(tmp_path, monkeypatch, seconds, known):
    monkeypatch.setattr(ledger, "CARD_SECONDS", seconds)
    told = []
    card = tmp_path / "out" / "run.json"
    ask(tmp_path, FakeVLM(), batch_size=2, report=lambda _: told.append(read_json(card)["totals"]["answers"]))
    assert told == known


@pytest.mark.parametrize(("seconds", "known"), [(30.0, {0}), (0.0, {12, 24, 36, 48, 60, 72})])
def test_the_card_of_an_evaluation_is_as_old_as_it_may_be(tmp_path, monkeypatch, seconds, known):
    monkeypatch.setattr(ledger, "CARD_SECONDS", seconds)
    told = set()

    def report(done, total):
        if done <= 24:
            (session,) = read_json(tmp_path / "out" / "card.json")["sessions"]
            told.add(session.get("arms", {}).get("greedy", {"tokens": 0})["tokens"])

    ask_arms(tmp_path, FakeVLM(), batch_size=3, report=report)
    assert told == known


def test_a_file_without_failures_is_not_written_again(tmp_path):
    class Picky(FakeVLM):
        def generate(self, pictures, prompts, *, decoder, **options):
            self.fails = lambda batch: ValueError("odd") if decoder.name == "vcd" and batch[0][0] == colour(2) else None
            return super().generate(pictures, prompts, **options)

    assert ask_arms(tmp_path, Picky(), batch_size=3).failed("vcd") == 4
    files = {arm: tmp_path / "out" / arm / "answers.jsonl" for arm in ("greedy", "vcd")}
    before = {arm: file.stat().st_ino for arm, file in files.items()}
    assert ask_arms(tmp_path, FakeVLM(), batch_size=3, retry_failed=True).failed("vcd") == 0
    assert {arm: file.stat().st_ino != before[arm] for arm, file in files.items()} == {"greedy": False, "vcd": True}
