"""How far a run is, read from its folder while it runs and after."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import go
from vlmfix.errors import DataError
from vlmfix.jobs.status import read_status
from vlmfix.records import JsonLines, read_json, replace_json

BEGUN = datetime(2026, 11, 29, 12, tzinfo=UTC)


def stopped(tmp_path):
    """A run of ten pictures, one broken and one refused, that was interrupted in its second batch."""
    pictures, out = draw(tmp_path / "in", 10), tmp_path / "out"
    (pictures / "0001.png").write_bytes(b"")
    vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt() if len(vlm.batches) == 2 else None, broken=[colour(2)])
    with pytest.raises(KeyboardInterrupt):
        go(pictures, out, vlm)
    return pictures, out


def marked(out, *marks):
    """Gives a card times at which so many questions were done."""
    card = read_json(out / "run.json")
    recent = [{"time": (BEGUN + timedelta(seconds=second)).isoformat(), "done": done} for second, done in marks]
    replace_json(out / "run.json", card | {"progress": card["progress"] | {"recent": recent}})


def test_a_dead_run_tells_what_is_done_and_left(tmp_path):
    pictures, out = stopped(tmp_path)
    found = read_status(out)
    assert (found.running, found.finished) == (False, False)
    assert (found.answers, found.failed, found.total, found.left) == (3, 2, 10, 5)
    assert found.reasons == {"empty file": 1, "the model's output was not a number": 1}
    assert (found.rate, found.seconds_left) == (None, None)
    go(pictures, out, FakeVLM())
    found = read_status(out)
    assert (found.running, found.finished, found.answers, found.failed, found.left) == (False, True, 8, 2, 0)


def test_a_running_one_is_known_by_its_lock_and_keeps_it(tmp_path):
    _, out = stopped(tmp_path)
    marked(out, (0, 0), (60, 1), (120, 3))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with JsonLines(out / "answers.jsonl") as lines:
        found = read_status(out, BEGUN + timedelta(seconds=180))
        assert (found.running, found.over, found.rate) == (True, 180, 5 / 180)
        assert found.seconds_left == pytest.approx(5 * 180 / 5)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        lines.append({"image": "0009.png"})
        assert read_status(out).left == 4  # the card is behind


def test_a_rate_is_of_the_last_minutes(tmp_path):
    _, out = stopped(tmp_path)
    marked(out, (0, 0), (300, 1), (400, 3))
    found = read_status(out)
    assert (found.rate, found.over) == (2 / 100, 100)  # of one that ended, up to its last mark
    with JsonLines(out / "answers.jsonl"):
        found = read_status(out, BEGUN + timedelta(seconds=600))
        assert (found.rate, found.over) == (4 / 300, 300)
        found = read_status(out, BEGUN + timedelta(seconds=4000))
        assert (found.rate, found.over) == (2 / 3600, 3600)  # it hangs
        assert read_status(out, BEGUN + timedelta(seconds=405)).rate == 4 / 105
        marked(out, (400, 3))
        assert read_status(out, BEGUN + timedelta(seconds=405)).rate is None


def test_marks_are_made_while_a_model_answers_and_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmfix.jobs.ledger.CARD_SECONDS", -1.0)
    go(draw(tmp_path / "in", 40), tmp_path / "out", FakeVLM(), batch_size=1)
    recent = read_json(tmp_path / "out" / "run.json")["progress"]["recent"]
    assert [mark["done"] for mark in recent] == [*range(30, 41), 40]


def test_before_the_first_card_a_lock_alone_is_known(tmp_path):
    with JsonLines(tmp_path / "answers.jsonl"):
        found = read_status(tmp_path)
    assert (found.running, found.total, found.left, found.updated) == (True, None, None, "")


def test_what_is_no_folder_of_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither run\.json nor answers\.jsonl"):
        read_status(tmp_path)
    (tmp_path / "run.json").write_text('{"finished": 1}')
    with pytest.raises(DataError, match="has no updated, totals"):
        read_status(tmp_path)


def test_the_command_says_it_without_torch(tmp_path):
    _, out = stopped(tmp_path)
    code = "import sys, vlmfix.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    arguments = f"import sys; sys.argv = ['vlmfix', 'status', {str(out)!r}"
    said = [
        subprocess.run([sys.executable, "-c", f"{arguments}{more}]\n{code}"], capture_output=True, text=True)
        for more in ("", ", '--json'")
    ]
    assert [run.stderr for run in said] == ["False\n", "False\n"]
    text = said[0].stdout.splitlines()
    assert text[0] == f"{out}: stopped"
    assert text[1] == "  3 answers and 2 failures, of 10 questions, 5 left"
    assert "  1 failed: empty file" in text
    found = json.loads(said[1].stdout)
    assert (found["state"], found["answers"], found["total"], found["left"]) == ("stopped", 3, 10, 5)
