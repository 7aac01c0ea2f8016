"""Folders, files and names that are not as an evaluation leaves them: told in words, or refused."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest

from tests.evals.fake import Says, workload
from tests.jobs.benchmark.asked import go
from tests.jobs.fake import FakeVLM
from vlmfix.decoders import VCD, parse
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.record import read_run
from vlmfix.evals.score import score
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.jobs.benchmark.reproduce import reproduce
from vlmfix.records import read_json
from vlmfix.settings import Settings


@pytest.mark.parametrize("name", ["../in/0001.png", "/etc/hostname", "below/../../in/0001.png"])
def test_pictures_outside_of_the_folder_are_refused(tmp_path, name):
    work = workload(tmp_path / "in")
    samples = [replace(work.samples[0], image=name), *work.samples[1:]]
    with pytest.raises(DataError, match=f"1 of 7 pictures have names that lead out of .*: {name}"):
        go(tmp_path / "out", replace(work, samples=samples), FakeVLM())
    assert not (tmp_path / "out").exists()


def test_a_linked_picture_is_a_picture(tmp_path):
    work = workload(tmp_path / "in")
    (tmp_path / "in" / "0001.png").rename(tmp_path / "elsewhere.png")
    (tmp_path / "in" / "0001.png").symlink_to(tmp_path / "elsewhere.png")
    assert go(tmp_path / "out", work, FakeVLM()).failed("greedy") == 0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "greedy").write_text("a file")
    with pytest.raises(DataError, match=r"cannot make the folder .*greedy"):
        go(tmp_path / "out", workload(tmp_path / "in"), FakeVLM())


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(DataError, match=r"holds no card.json"):
        read_run(tmp_path)


def test_changed_samples_are_noticed(tmp_path):
    go(tmp_path / "out", workload(tmp_path / "in"), FakeVLM())
    path = tmp_path / "out" / "samples.jsonl"
    path.write_text(path.read_text().replace('"word": "shared"', '"word": "changed"', 1))
    with pytest.raises(DataError, match="not what the run asked"):
        read_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("samples.jsonl", '{"idd": "1"}\n', "line 1 of .*samples.jsonl has no id, image"),
        ("greedy/answers.jsonl", '{"idd": "1"}\n', "line 1 of .*answers.jsonl has no id"),
        ("greedy/answers.jsonl", '{"id": "a/0/shared"}\n', "has neither answer nor failed"),
        ("greedy/answers.jsonl", '{"id": "z", "answer": "a"}\n', "line 1 .* has the id 'z', which no sample has"),
        ("greedy/answers.jsonl", '{"id": "a/0/shared", "answer": 1}\n', "answer is 1, not a text"),
        ("greedy/answers.jsonl", '{"id": "a/0/shared", "answer": "a", "ids": 5}\n', "ids is 5, not a list"),
        ("card.json", '{"format": 1, "task": "says"}', "card.json has no options, samples, arms"),
    ],
)
def test_a_changed_run_is_told_in_words(tmp_path, file, text, message):
    go(tmp_path / "out", workload(tmp_path / "in"), FakeVLM())
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path / "out")


def test_answers_that_no_card_knows_are_not_touched(tmp_path):
    work, out = workload(tmp_path / "in"), tmp_path / "out"
    for text in ('{"my": "own"}', "one\ntwo", "\0"):
        (out / "greedy").mkdir(parents=True, exist_ok=True)
        (out / "greedy" / "answers.jsonl").write_text(text)
        with pytest.raises(UsageError, match=r"no card\.json"):
            go(out, work, FakeVLM())
        assert (out / "greedy" / "answers.jsonl").read_text() == text
    (out / "greedy" / "answers.jsonl").unlink()
    for name in ("samples.jsonl", "results.json", "report.json", "comparison.csv"):
        (out / name).write_text("precious")
        with pytest.raises(UsageError, match=f"holds {name} but no card"):
            go(out, work, FakeVLM())
        assert (out / name).read_text() == "precious"
        (out / name).unlink()
    go(out, work, FakeVLM())
    (out / "vcd").mkdir()
    (out / "vcd" / "answers.jsonl").write_text("precious")  # of an arm that the card does not know
    with pytest.raises(UsageError, match=r"no card\.json says which"):
        go(out, work, FakeVLM(), arms=("vcd",))
    assert (out / "vcd" / "answers.jsonl").read_text() == "precious"


def test_links_lead_to_no_writing_elsewhere(tmp_path):
    work, out, elsewhere = workload(tmp_path / "in"), tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    out.mkdir()
    (elsewhere / "answers.jsonl").write_text("precious")
    (out / "greedy").symlink_to(elsewhere)
    with pytest.raises(DataError, match="greedy is a link"):
        go(out, work, FakeVLM())
    (out / "greedy").unlink()
    (out / "greedy").mkdir()
    (out / "greedy" / "answers.jsonl").symlink_to(elsewhere / "answers.jsonl")
    with pytest.raises(DataError, match=r"answers\.jsonl is a link"):
        go(out, work, FakeVLM())
    (out / "greedy" / "answers.jsonl").unlink()
    for name in (".card.json.new", ".samples.jsonl.new"):
        (out / name).symlink_to(elsewhere / "answers.jsonl")
    go(out, work, FakeVLM())
    assert [path.name for path in elsewhere.iterdir()] == ["answers.jsonl"]
    assert (elsewhere / "answers.jsonl").read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "y" * 300, "..", "", "a\nb", "caf\udce9", "\ud800"])
def test_arms_of_any_name_have_a_folder(tmp_path, name):
    out, work = tmp_path / "out", workload(tmp_path / "in", 1)
    for _ in range(2):
        run = evaluate(out, Says(), work, Settings(), {name: VCD()}, loader=FakeVLM().load)
    assert run.missing(name) == 0
    assert len(list(out.glob("*/answers.jsonl"))) == 2


def test_arms_that_would_share_a_folder_are_refused(tmp_path):
    work = workload(tmp_path / "in", 1)
    for names in (("a/b", "a_b"), ("samples.jsonl",)):
        arms = {name: parse(f"vcd:contrast=0.{number}") for number, name in enumerate(names, start=1)}
        with pytest.raises(UsageError, match="would share the folder"):
            evaluate(tmp_path / "out", Says(), work, Settings(), arms, loader=FakeVLM().load)


CARD = {
    "arms": [None, [], "x", 5, {"greedy": None}, {"greedy": {"spec": 5, "parameters": {}}}, {"greedy": {}}],
    "sessions": [
        *(None, {}, [None], [{}], [{"versions": 1}], [{"versions": {"torch": 1}}]),
        *([{"versions": {}, name: 5}] for name in ("arms", "started", "updated", "device")),
    ],
    "checkpoint": [
        5,
        [],
        {},
        {"ends": ["x"], "set_aside": {}, "completed": {}},
        {"ends": [1], "set_aside": [], "completed": {}},
    ],
    "decoding": [None, {}, "x", {"max_new_tokens": None, "num_beams": 1, "temperature": 0, "seed": 0}],
    "task": [None, 5, [], {}, "nothing"],
    "revision": [5, [], {}],
    "commit": [5],
    "options": [None, [], {"upper": "no"}, {"lower": True}],
    "samples": [None, 5],
    "count": [None, "many"],
    "data": [None, []],
    "format": [None, "1", True],
    "batch_size": [0, "x", 10**400],
    "images": [5, "\0", "\ud800"],
}


@pytest.mark.parametrize("field", CARD)
def test_a_damaged_card_is_told_in_words(tmp_path, field):
    work, out, vlm = workload(tmp_path / "in", 1), tmp_path / "out", FakeVLM()
    go(out, work, vlm)
    whole = read_json(out / "card.json")
    for value in CARD[field]:
        (out / "card.json").write_text(json.dumps(whole | {field: value}))
        for step in (
            lambda: read_run(out),
            lambda: go(out, work, vlm, arms=("vcd",)),
        ):
            with pytest.raises(VlmfixError, match=r"card\.json"):
                step()
    (out / "card.json").write_text(json.dumps({name: value for name, value in whole.items() if name != field}))
    for step in (
        lambda: score(read_run(out)),
        lambda: compare([read_run(out)], draws=1000),
        lambda: reproduce(read_run(out), tmp_path / "again", loader=vlm.load),
        lambda: go(out, work, vlm, arms=("vcd",)),
    ):
        with suppress(VlmfixError):  # what is not needed may be missing; nothing else than a message may be raised
            step()
    assert len(vlm.batches) <= 4


def test_a_card_with_unknown_decoding_is_not_made_again(tmp_path):
    work, out = workload(tmp_path / "in", 1), tmp_path / "out"
    go(out, work, FakeVLM())
    card = read_json(out / "card.json")
    (out / "card.json").write_text(json.dumps(card | {"decoding": card["decoding"] | {"unknown": 1}}))
    with pytest.raises(DataError, match=r"card\.json: decoding has unknown"):
        reproduce(read_run(out), tmp_path / "again", loader=FakeVLM().load)
