"""kill -9 at any moment, and on from there: no picture lost, none twice, no torn line."""

import os
import random
import signal
import time

import pytest

from tests.deadly import die_at
from tests.jobs.fake import FakeVLM, draw
from tests.processes import ended, server
from vlmfix.errors import UsageError
from vlmfix.jobs.folder import Questions, run
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings

COUNT = 150


def work(pictures, out):
    questions = Questions(everywhere=("A?", "B?"))
    vlm = FakeVLM(seconds=0.003)
    run(pictures, out, questions=questions, settings=Settings(), batch_size=3, loader=vlm.load)


@pytest.fixture(scope="module")
def start():
    return lambda *arguments: server().Process(target=work, args=arguments)


def wait_for(path, size):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.exists() and path.stat().st_size > size:
            return
        time.sleep(0.002)
    pytest.fail(f"{path} did not grow")


def test_killed_and_resumed(tmp_path, start):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    (pictures / "0050x.png").write_bytes(b"")
    answers, chance, kills, size = out / "answers.jsonl", random.Random(1), 0, 0
    while kills < 6:
        process = start(pictures, out)
        process.start()
        wait_for(answers, size)
        time.sleep(chance.uniform(0, 0.08))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        with answers.open("ab") as file:  # what a write cut short by a power cut leaves
            file.write(b'{"image": "00')
        size = answers.stat().st_size
    assert 0 < len(list(read_lines(answers))) < 2 * COUNT
    work(pictures, out)
    expected = [(f"{n:04d}.png", prompt) for n in range(COUNT) for prompt in ("A?", "B?")]
    # one that was killed while it answered a picture alone, after another one, leaves that for the end
    assert sorted((record["image"], record["prompt"]) for record in read_lines(answers)) == expected
    assert [record["image"] for record in read_lines(out / "failed.jsonl")] == ["0050x.png"]
    card = read_json(out / "run.json")
    assert card["totals"] == {"answers": 300, "failed": 1, "cut": 0, "tokens": 900, "seconds": 150.0}
    assert len(card["sessions"]) >= 6
    assert sorted(os.listdir(out)) == ["answers.jsonl", "failed.jsonl", "run.json"]


def test_two_at_once_are_refused(tmp_path, start):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    process = start(pictures, out)
    process.start()
    try:
        wait_for(out / "answers.jsonl", 0)
        with pytest.raises(UsageError, match="another process"):
            work(pictures, out)
    finally:
        process.kill()
        process.join()
    work(pictures, out)
    assert len(list(read_lines(out / "answers.jsonl"))) == 2 * COUNT


def killed_at(step, pictures, out):
    """A first start, in a process that dies just before one of the calls that change the folder."""
    die_at(step)
    go(pictures, out, FakeVLM())


def go(pictures, out, vlm):
    return run(pictures, out, questions=Questions.text("What?"), settings=Settings(), batch_size=2, loader=vlm.load)


def test_killed_at_every_change_of_the_folder(tmp_path):
    pictures = draw(tmp_path / "in", 3)
    (pictures / "0001b.png").write_bytes(b"")
    step, code, unfinished = 0, -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        out = tmp_path / f"out{step}"
        code = ended(killed_at, step, pictures, out)
        complete = len(list(read_lines(out / "answers.jsonl"))) == 3
        unfinished += complete and not read_json(out / "run.json")["finished"]
        end = go(pictures, out, FakeVLM())
        assert (end.totals.answers, end.totals.failed) == (3, 1)
        assert [record["image"] for record in read_lines(out / "answers.jsonl")] == ["0000.png", "0001.png", "0002.png"]
        assert sorted(os.listdir(out)) == ["answers.jsonl", "failed.jsonl", "run.json"]
        card = read_json(out / "run.json")
        assert (card["finished"], card["totals"]["answers"], card["totals"]["failed"]) == (True, 3, 1)
        assert reproduce(out, tmp_path / f"again{step}", loader=FakeVLM().load).other == ()
        step += 1
    assert code == 0
    assert unfinished >= 2  # killed behind the last answer, before or while the card is written
