"""Damaged files of a run that workers share: it goes on to a whole end, or a line names the file; nothing is lost."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import strategies as st

from tests.fuzz.bounds import bounded
from tests.fuzz.messages import names, one_line
from tests.fuzz.mutations import damages
from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import WHAT, answers, failures
from vlmfix.errors import VlmfixError
from vlmfix.jobs import blocks
from vlmfix.jobs.folder import pulse, steal, worker
from vlmfix.jobs.folder.merge import merge
from vlmfix.jobs.journal import BEGUN, DIED
from vlmfix.jobs.status import read_shared
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings

COUNT, BROKEN = 9, 5
FILES = (
    "plan/00000000/pictures.jsonl",
    "plan/00000002/pictures.jsonl",
    "plan/00000003/pictures.jsonl",
    "plan/00000005/all.json",
    "leases/00000001-0000",
    "leases/00000002-0000",
    "leases/plan-0000",
    "parts/00000002-0000/lines.jsonl",
    "parts/00000002-0000/begun.jsonl",
    "done/00000001/lines.jsonl",
    "done/00000001/count.json",
    "workers/one.json",
    "workers/two.json",
)
WRITTEN = ("parts/00000002-0000/lines.jsonl", "done/00000001/lines.jsonl")
"""Files whose answers stand for themselves: nothing else says what they were."""
SECONDS, MEMORY = 10, 300
GONE = "gone"


def go(pictures, out):
    return steal(pictures, out, questions=WHAT, settings=Settings(), batch_size=2, loader=FakeVLM().load)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A run in five blocks: two are done, one was left by a dead worker, two are free."""
    monkeypatch.setattr(blocks, "LEASE_SECONDS", 0.02)
    monkeypatch.setattr(blocks, "SMALLEST", 2)
    monkeypatch.setattr(worker, "PAUSE_SECONDS", 0.01)
    pictures, out = draw(tmp_path / "pictures", COUNT), tmp_path / "out"
    (pictures / f"{BROKEN:04d}.png").write_bytes(b"broken")
    with monkeypatch.context() as patch:
        patch.setattr(pulse, "named_worker", lambda: "one")
        go(pictures, out)
    folder = out / "blocks"
    part = folder / "parts" / "00000002-0000"
    (folder / "done" / "00000002").rename(part)
    (part / "count.json").unlink()
    first, _ = (part / "lines.jsonl").read_text().splitlines(keepends=True)
    (part / "lines.jsonl").write_text(first)
    (part / BEGUN).write_text('{"begun": ["0004.png", "0005.png"]}\n{"apart": ["0005.png"]}\n')
    (folder / "leases" / "00000002-0000").write_text("two")
    for name in ("00000003", "00000004"):
        shutil.rmtree(folder / "done" / name)
        (folder / "leases" / f"{name}-0000").unlink()
    replace_json(folder / "workers" / "two.json", read_json(folder / "workers" / "one.json") | {"ended": False})
    return pictures, out


def held(problem):
    problem.__traceback__ = problem.__cause__ = problem.__context__ = None
    one_line(problem)
    return problem


def test_damaged_files_of_a_shared_run(shared, rounds, tmp_path, capfd):
    pictures, out = shared
    whole = tmp_path / "whole"
    out.rename(whole)
    shown = {path: path.read_bytes() for path in pictures.iterdir()}

    def tried(work, path):
        """Does something with the run; gives whether it came to its end, and holds the error if not."""
        try:
            work()
        except VlmfixError as error:
            names(held(error), path.name, path.parent.name, tmp_path)
            return False
        finally:
            capfd.readouterr()
        return True

    def check(file, damage):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        path = out / "blocks" / file
        if damage == GONE:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes(), path.suffix))
        with bounded(seconds=SECONDS, mebibytes=MEMORY):
            tried(lambda: read_shared(out), path)
            ended = tried(lambda: go(pictures, out), path)
            tried(lambda: read_shared(out), path)
            joined = tried(lambda: merge(out), path)
        assert {path: path.read_bytes() for path in pictures.iterdir()} == shown
        if not joined:
            return
        assert ended, "it was joined though no worker had done the rest"
        told = [(line["image"], line.get("prompt")) for line in [*answers(out), *failures(out)]]
        assert len(told) == len(set(told)), "something stands twice"
        assert {image for image, _ in told} == {f"{number:04d}.png" for number in range(COUNT)}, "something is lost"
        for line in answers(out) if file not in WRITTEN else ():
            assert line["answer"] == f"What?: {colour(int(line['image'][:4]))}"
        for line in failures(out) if file not in WRITTEN else ():
            given_up = line["reason"] == DIED and path.name == BEGUN
            assert given_up or line["image"] == f"{BROKEN:04d}.png", line

    check("workers/one.json", lambda content, suffix: content)  # whole, it is gone on with
    rounds(check, suite=30, file=st.sampled_from(FILES), damage=damages() | st.just(GONE))


def test_the_run_is_as_it_is_described(shared):
    pictures, out = shared
    assert all((out / "blocks" / file).is_file() for file in FILES)
    found = read_shared(out)
    assert (found.answers + found.failed, found.left) == (5, 4)
    go(pictures, out)
    merge(out)
    assert (len(answers(out)), len(failures(out))) == (COUNT - 1, 1)
    assert json.loads((out / "run.json").read_text())["finished"]
