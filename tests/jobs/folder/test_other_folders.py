"""Folders and files that are not as a run leaves them: told in words, and nothing of them is touched."""

import json
import os

import pytest

from tests.jobs.fake import FakeVLM, draw
from tests.jobs.folder.asked import answers, go, never_loaded
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.records import read_json


def test_answers_without_a_card_are_not_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for text in (
        '{"text": "mine"}\n',
        '{"image": "a", "prompt": "b", "tokens": 1, "seconds": 1}\n',
        "one\ntwo",
        "{}",
        "\0",
    ):
        for name in ("answers.jsonl", "failed.jsonl"):
            (out / name).write_text(text)
            with pytest.raises(UsageError, match=r"no run\.json"):
                go(draw(tmp_path / "in", 2), out, FakeVLM())
            assert (out / name).read_text() == text
            (out / name).unlink()


def test_another_card_is_not_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for text in ('{"my": "own"}', "[1]", '{"settings": {}}', "notes"):
        (out / "run.json").write_text(text)
        (out / "answers.jsonl").write_text("precious")
        with pytest.raises(DataError, match=r"run\.json"):
            go(draw(tmp_path / "in", 2), out, FakeVLM())
        assert (out / "run.json").read_text() == text
        assert (out / "answers.jsonl").read_text() == "precious"


def test_links_lead_to_no_writing_elsewhere(tmp_path):
    pictures, out = draw(tmp_path / "in", 2), tmp_path / "out"
    out.mkdir()
    for name in ("answers.jsonl", "failed.jsonl", ".run.json.new", ".answers.jsonl.new"):
        (tmp_path / name).write_text("precious")
    for name in ("answers.jsonl", "failed.jsonl"):
        (out / name).symlink_to(tmp_path / name)
        with pytest.raises(DataError, match=f"{name} is a link"):
            go(pictures, out, FakeVLM())
        (out / name).unlink()
    (out / ".run.json.new").symlink_to(tmp_path / ".run.json.new")
    (out / ".answers.jsonl.new").symlink_to(tmp_path / ".answers.jsonl.new")
    go(pictures, out, FakeVLM())
    assert len(answers(out)) == 2
    for name in ("answers.jsonl", "failed.jsonl", ".run.json.new", ".answers.jsonl.new"):
        assert (tmp_path / name).read_text() == "precious"


def test_out_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="cannot make the folder"):
        go(draw(tmp_path / "in", 2), tmp_path / "out", FakeVLM())
    assert (tmp_path / "out").read_text() == "mine"


def test_names_that_are_not_text(tmp_path):
    pictures = draw(tmp_path / "in", 1)
    name = "caf\udce9 \u2028.png"
    (pictures / "0000.png").rename(pictures / name)
    for _ in range(2):
        go(pictures, tmp_path / "out", FakeVLM())
    assert [record["image"] for record in answers(tmp_path / "out")] == [name]
    assert len((tmp_path / "out" / "answers.jsonl").read_text().split("\n")) == 2


def damaged(base):
    """A finished folder of three answers, its pictures, and a model that must not be asked for."""
    pictures, out, vlm = draw(base / "in", 3), base / "out", FakeVLM()
    go(pictures, out, vlm)
    vlm.load = never_loaded
    return pictures, out, vlm


LINE = {"image": "a.png", "prompt": "What?", "answer": "yes", "tokens": 1, "seconds": 0.5}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("image", [[1], None, 5, {}]),
        ("prompt", [{}, None, 5]),
        ("answer", [None, []]),
        ("tokens", ["many", None, 10**400, -1, 1.5, True, []]),
        ("seconds", ["x", None, -1, 1e300, float("nan"), float("inf"), {}]),
    ],
)
def test_damaged_answers_are_named_before_the_model_is_loaded(tmp_path, field, values):
    pictures, out, vlm = damaged(tmp_path)
    for value in values:
        (out / "answers.jsonl").write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE | {field: value})}\n")
        for step in (lambda: go(pictures, out, vlm), lambda: reproduce(out, tmp_path / "again", loader=FakeVLM().load)):
            with pytest.raises(DataError, match=r"line 2 of .*answers\.jsonl"):
                step()


@pytest.mark.parametrize(
    "line", [{"image": [1], "reason": ""}, {"image": "a"}, {"image": "a", "reason": "", "prompt": 5}]
)
def test_damaged_failures_are_named(tmp_path, line):
    pictures, out, vlm = damaged(tmp_path)
    (out / "failed.jsonl").write_text(f"{json.dumps(line)}\n")
    with pytest.raises(DataError, match=r"line 1 of .*failed\.jsonl"):
        go(pictures, out, vlm)


def cards(whole):
    """Run cards that were changed, whole ones among them no more."""
    yield from ("{}", "[]", "[" * 100_000, "\0", '{"settings": ' * 200 + "1" + "}" * 200)
    for value in (None, "text", [], 5, {}):
        yield json.dumps(whole | {"settings": value})
        yield json.dumps(whole | {"sessions": value})
        yield json.dumps(whole | {"sessions": [value]})
    for name, value in whole["settings"].items():
        for other in ([], {"x": 1}, 5, None, "text", 10**400):
            if type(other) is not type(value):
                yield json.dumps(whole | {"settings": whole["settings"] | {name: other}})
        flipped = {
            key if key != name else f"{key[:-1]}{chr(ord(key[-1]) ^ 1)}": kept
            for key, kept in whole["settings"].items()
        }
        yield json.dumps(whole | {"settings": flipped})
    for name in whole:
        yield json.dumps({key: kept for key, kept in whole.items() if key != name})


def test_damaged_cards_are_told_in_words(tmp_path):
    pictures, out, vlm = damaged(tmp_path)
    whole = read_json(out / "run.json")
    answers_before = (out / "answers.jsonl").read_bytes()
    told = 0
    for text in cards(whole):
        (out / "run.json").write_text(text)
        for step in (lambda: go(pictures, out, vlm), lambda: reproduce(out, tmp_path / "again", loader=never_loaded)):
            try:
                step()
            except VlmfixError as error:
                told += "run.json" in str(error)
            except pytest.fail.Exception:  # what was changed decides no answer, or is compared with the model there
                continue
    assert told > 100
    assert (out / "answers.jsonl").read_bytes() == answers_before


def test_files_that_are_no_files_are_told_in_words(tmp_path):
    pictures, out, vlm = damaged(tmp_path)
    for name in ("answers.jsonl", "run.json"):
        kept = (out / name).read_bytes()
        (out / name).unlink()
        os.mkfifo(out / name)
        for step in (lambda: go(pictures, out, vlm), lambda: reproduce(out, tmp_path / "again", loader=FakeVLM().load)):
            with pytest.raises(DataError, match="it is not a file"):
                step()
        (out / name).unlink()
        (out / name).write_bytes(kept)


def test_a_folder_name_that_none_can_have_is_told(tmp_path):
    pictures, out, vlm = draw(tmp_path / "in", 1), tmp_path / "out", FakeVLM()
    go(pictures, out, vlm)
    card = read_json(out / "run.json")
    (out / "run.json").write_text(json.dumps(card | {"settings": card["settings"] | {"pictures": "x" * 5000}}))
    with pytest.raises(DataError, match="with the pictures of"):
        reproduce(out, tmp_path / "again", loader=FakeVLM().load)
