"""Answers that are there, scored by other truths."""

import json
from dataclasses import replace

import pytest

from tests.jobs.fake import FakeVLM, colour, draw
from vlmfix.decoders import parse
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks import pope
from vlmfix.evals.record import read_run
from vlmfix.evals.score import answered_before, score
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.records import read_json
from vlmfix.settings import Settings


def asked(folder, labels, *, text="Is there a dog?"):
    """A question file of the split popular, one question a picture; a label of None leaves it out."""
    folder.mkdir()
    lines = [
        json.dumps({"question_id": number, "image": f"{number:04d}.png", "text": text, "label": label})
        for number, label in enumerate(labels)
        if label is not None
    ]
    (folder / "popular.json").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(tmp_path):
    draw(tmp_path / "in", 6)
    work = pope.read(asked(tmp_path / "pope", ["yes", "no"] * 3), tmp_path / "in")
    made = evaluate(
        tmp_path / "out", pope.Pope(), work, Settings(), {"vcd": parse("vcd")}, batch_size=2, loader=FakeVLM().load
    )
    return score(made)


def test_a_run_of_pope_is_scored_by_the_truths_of_another_edition(run, tmp_path):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    labels = ["no", "no", None, "yes", None, "no"]
    work = pope.read(asked(tmp_path / "repope", labels), tmp_path / "in")
    again = score(answered_before(run, work, tmp_path / "new"))
    assert {path: path.read_bytes() for path in before} == before
    found = read_run(tmp_path / "new")
    assert [sample.target["label"] for sample in found.samples] == ["no", "no", "yes", "no"]
    assert list(found.answers) == ["greedy", "vcd"]
    assert all(found.missing(arm) == 0 for arm in found.answers)
    said = [record.answer for record in run.answers["greedy"].values()]
    assert [record.answer for record in found.answers["greedy"].values()] == [said[n] for n in (0, 1, 3, 5)]
    assert (found.card["count"], found.card["weights"]) == (4, run.card["weights"])
    assert found.card["answers_from"] == str(run.folder)
    figures = read_json(tmp_path / "new" / "results.json")["greedy"]["popular"]
    assert (figures["n"], figures["recall"], figures["precision"]) == (4, 1.0, 0.25), "all is read as yes"
    assert again.pictures() == {name: sha for name, sha in run.pictures().items() if name[:4] not in ("0002", "0004")}


def test_what_a_contrast_left_alone_is_counted_over_the_answers_that_are_taken(tmp_path):
    class Sure(FakeVLM):
        def generate(self, pictures, prompts, *, decoder, **options):
            answers = super().generate(pictures, prompts, **options)
            if not decoder.waiting:
                return answers
            return [
                replace(answer, skipped=0 if shown == colour(0) else 3)
                for answer, (shown, _) in zip(answers, self.batches[-1], strict=True)
            ]

    draw(tmp_path / "in", 2)
    both = pope.read(asked(tmp_path / "pope", ["yes", "no"]), tmp_path / "in")
    arms = {"vcd": parse("vcd:when=uncertain")}
    made = evaluate(tmp_path / "out", pope.Pope(), both, Settings(), arms, batch_size=2, loader=Sure().load)
    assert made.card["arms"]["vcd"]["skip_rate"] == 0.5
    second = pope.read(asked(tmp_path / "repope", [None, "yes"]), tmp_path / "in")
    again = answered_before(made, second, tmp_path / "new")
    assert (again.card["arms"]["vcd"]["skipped"], again.card["arms"]["vcd"]["skip_rate"]) == (3, 1.0)
    assert "skip_rate" not in again.card["arms"]["greedy"]
    assert made.card["arms"]["vcd"]["skip_rate"] == 0.5


@pytest.mark.parametrize("other", [{"text": "Is there a cat?"}, {"labels": ["yes"] * 7}])
def test_questions_that_were_not_asked_are_named(run, tmp_path, other):
    draw(tmp_path / "in", 7)
    given = {"labels": ["yes"] * 6} | other
    work = pope.read(asked(tmp_path / "other", given.pop("labels"), **given), tmp_path / "in")
    with pytest.raises(DataError, match=r"[16] of [67] questions were not asked in .*: popular/"):
        answered_before(run, work, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    work = pope.read(tmp_path / "pope", tmp_path / "in")
    with pytest.raises(UsageError, match="is not empty"):
        answered_before(run, work, run.folder)
