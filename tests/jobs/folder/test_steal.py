"""Workers that share a run: nothing lost and nothing twice, whoever is slow, dies or finds the disk full."""

import errno
import json
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from tests.deadly import die_at
from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import WHAT, answers, failures, never_loaded
from tests.processes import ended, server
from vlmfix.errors import DataError, PassingError, SystematicError, UsageError
from vlmfix.jobs import blocks as shared
from vlmfix.jobs.blocks import BlockFolder, Lease
from vlmfix.jobs.folder import Questions, job, planner, pulse, run, steal
from vlmfix.jobs.folder import worker as module
from vlmfix.jobs.folder.merge import merge
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.jobs.shards import Shard
from vlmfix.jobs.status import read_shared
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings
from vlmfix.sources import source_of

COUNT = 70
"""Pictures: four blocks of 16, and one of 6."""


def go(pictures, out, vlm=None, *, questions=WHAT, loader=None, **settings):
    loader = loader or (vlm or FakeVLM(broken=[colour(3)])).load
    return steal(pictures, out, questions=questions, settings=Settings(**settings), batch_size=4, loader=loader)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(shared, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.02)


@pytest.fixture
def pictures(tmp_path):
    """Seventy pictures; one is broken, one is refused by the model."""
    folder = draw(tmp_path / "in", COUNT)
    (folder / "0007.png").write_bytes(b"")
    return folder


@pytest.fixture
def whole(tmp_path, pictures):
    """What a run by itself makes of them."""
    out = tmp_path / "whole"
    run(
        pictures,
        out,
        questions=WHAT,
        settings=Settings(),
        batch_size=4,
        loader=FakeVLM(broken=[colour(3)]).load,
    )
    return out


def same(out, whole):
    """Holds a joined folder against that of a run by itself, whose lines are in the same order."""
    merge(out)
    assert answers(out) == answers(whole)
    assert sorted(map(str, failures(out))) == sorted(map(str, failures(whole)))


def names(vlm):
    return [shown[0][0] for batch in vlm.batches for shown in batch]


def test_one_worker_makes_what_a_run_makes(tmp_path, pictures, whole):
    out = tmp_path / "out"
    end = go(pictures, out)
    assert (end.blocks, end.done, end.progress.total, end.progress.totals.answers) == (5, 5, 70, 68)
    same(out, whole)
    joined, one = read_json(out / "run.json"), read_json(whole / "run.json")
    assert (joined["settings"], joined["totals"]) == (one["settings"], one["totals"])
    assert (joined["merged"], joined["finished"], joined["progress"]["total"]) == (1, True, 70)
    assert reproduce(out, tmp_path / "again", loader=FakeVLM().load).other == ()
    assert go(pictures, out, loader=never_loaded).progress.total == 0
    draw(pictures, COUNT + 3)  # one that was broken is whole now, and is not asked about again
    assert go(pictures, out).progress.total == 3
    merge(out)
    assert (len(answers(out)), len(failures(out))) == (71, 2)


def test_several_at_once_share_it(tmp_path, pictures, whole):
    out, models = tmp_path / "out", [FakeVLM(broken=[colour(3)], seconds=0.002) for _ in range(3)]
    threads = [threading.Thread(target=go, args=(pictures, out, vlm)) for vlm in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [name for vlm in models for name in names(vlm)]
    assert sorted(asked) == [number for number in range(COUNT) if number != 7]
    assert sum(bool(vlm.batches) for vlm in models) > 1
    same(out, whole)
    assert len(read_json(out / "run.json")["sessions"]) == 3


def work(pictures, out):
    go(pictures, out, FakeVLM(broken=[colour(3)], seconds=0.01))


def test_what_a_dead_worker_has_is_taken_over_with_what_it_wrote(tmp_path, pictures, whole):
    out, blocks = tmp_path / "out", BlockFolder(tmp_path / "out")
    process = server().Process(target=work, args=(pictures, out))
    process.start()
    until = time.monotonic() + 60
    while sum(count + failed.total() for _, count, failed in blocks.in_progress()) < 3:
        assert time.monotonic() < until
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = sum(blocks.counts(number)["answers"] for number in blocks.finished())
    kept += sum(count for _, count, _ in blocks.in_progress())
    begun, vlm = time.monotonic(), FakeVLM(broken=[colour(3)])
    go(pictures, out, vlm)
    assert time.monotonic() - begun > 0.3
    same(out, whole)
    assert COUNT - 1 - kept - 1 <= len(names(vlm)) <= COUNT - 1 - kept


@contextmanager
def stuck(pictures, out, monkeypatch, at=3, *, silent=True):
    """A worker that answers some batches, and then hangs until it is told to go on; its file may say that it lives."""
    here, further, found = threading.Event(), threading.Event(), []

    class Slow(FakeVLM):
        def generate(self, *arguments, **options):
            if len(self.batches) == at:
                here.set()
                further.wait(30)
            return super().generate(*arguments, **options)

    def slow():
        try:
            found.append(go(pictures, out, Slow(broken=[colour(3)])))
        except Exception as error:
            found.append(error)

    if silent:
        monkeypatch.setattr(pulse.Worker, "_beat", lambda worker: worker._ending.wait())
    thread = threading.Thread(target=slow)
    thread.start()
    assert here.wait(30)
    try:
        yield found
    finally:
        further.set()
        thread.join()


def test_a_slow_worker_whose_lease_ran_out_spoils_nothing(tmp_path, pictures, whole, monkeypatch):
    out = tmp_path / "out"
    with stuck(pictures, out, monkeypatch) as found:
        go(pictures, out)
        merge(out)
        before = (out / "answers.jsonl").read_bytes()
    assert found[0].done == 5
    same(out, whole)
    assert (out / "answers.jsonl").read_bytes() == before
    assert not any((out / "blocks" / "parts").iterdir())


def test_a_slow_worker_may_be_first_all_the_same(tmp_path, pictures, whole, monkeypatch):
    out, held = tmp_path / "out", threading.Event()
    with stuck(pictures, out, monkeypatch) as found:
        lease = [str(Lease(number, 1)) for number in range(5)]
        other = FakeVLM(broken=[colour(3)], fails=lambda batch: held.wait(30) and None)
        thread = threading.Thread(target=go, args=(pictures, out, other))
        thread.start()
        while not any((out / "blocks" / "leases" / name).exists() for name in lease):
            held.set()
            time.sleep(0.001)
        held.clear()
    held.set()
    thread.join()
    assert isinstance(found[0], module.Shared)
    same(out, whole)


def test_a_worker_that_hangs_loses_its_blocks_though_its_process_lives(tmp_path, pictures, whole, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(pulse, "STILL_SECONDS", 0.5)
    with stuck(pictures, out, monkeypatch, silent=False) as found:
        other = FakeVLM(broken=[colour(3)])
        go(pictures, out, other)
        assert sorted(worker.state for worker in read_shared(out).workers) == ["ended", "hung"]
        merge(out)
        before = (out / "answers.jsonl").read_bytes()
    assert found[0].done == 5
    same(out, whole)
    assert (out / "answers.jsonl").read_bytes() == before
    assert [worker.state for worker in read_shared(out).workers] == ["ended", "ended"]


def test_a_first_batch_may_take_its_time_and_a_slow_one_lets_others_be_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "STILL_SECONDS", 5.0)
    clock = [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock[0])
    folder = BlockFolder(tmp_path)
    folder.make()
    worker = pulse.Worker(folder, {})

    def hangs(*, after):
        clock[0] += after
        beat = worker.card["beat"]
        worker.save()
        assert worker.card["hung"] == (worker.card["beat"] == beat)
        return worker.card["hung"]

    assert not hangs(after=3599)
    worker.moved(batch=True)  # loading and compiling: no measure of what comes
    assert not hangs(after=4)
    worker.moved(batch=True)
    assert not hangs(after=39)
    assert hangs(after=2)
    worker.moved(batch=True)  # far longer than any before it
    assert not hangs(after=79)
    assert hangs(after=2)
    worker.moved()
    assert not hangs(after=79)


def test_a_planner_that_hangs_is_another_workers(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(pulse, "FIRST_SECONDS", 0.3)
    out, here, further, found = tmp_path / "out", threading.Event(), threading.Event(), []
    source_of = job.source_of

    class Slow:
        def __init__(self, source):
            self._source = source

        def __getattr__(self, name):
            return getattr(self._source, name)

        def __iter__(self):
            for number, file in enumerate(self._source):
                if number == 40 and threading.current_thread().name == "vlmfix-plan":
                    here.set()
                    further.wait(30)
                yield file

    with monkeypatch.context() as patch:
        patch.setattr(job, "source_of", lambda *given, **how: Slow(source_of(*given, **how)))
        thread = threading.Thread(target=lambda: found.append(go(pictures, out)))
        thread.start()
        assert here.wait(30)
    end = go(pictures, out)
    assert (end.blocks, end.done) == (5, 5)
    further.set()
    thread.join()
    merge(out)
    assert (found[0].done, len(answers(out)), len(failures(out))) == (5, 68, 2)


def killed_at(step, pictures, out):
    die_at(step, more=("rename", "mkdir"))
    shared.SMALLEST = 2
    go(pictures, out, FakeVLM())


def test_killed_at_changes_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "SMALLEST", 2)
    monkeypatch.setattr(shared, "LEASE_SECONDS", 0.01)
    pictures = draw(tmp_path / "in", 3)
    (pictures / "0001b.png").write_bytes(b"")
    step, code = 1, -signal.SIGKILL
    while code == -signal.SIGKILL:
        out = tmp_path / f"out{step}"
        code = ended(killed_at, step, pictures, out)
        go(pictures, out, FakeVLM())
        merge(out)
        assert [line["image"] for line in answers(out)] == ["0000.png", "0001.png", "0002.png"]
        assert [line["image"] for line in failures(out)] == ["0001b.png"]
        assert not any((out / "blocks" / "drafts").iterdir())
        step += 5
    assert (code, step > 30) == (0, True)


def test_a_full_disk_costs_nothing_but_time(tmp_path, pictures, whole, monkeypatch):
    out, write, left = tmp_path / "out", os.write, [0]

    def full(file, content):
        left[0] -= 1
        if left[0] < 0 and len(content) > 1:
            write(file, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content)

    for room in (0, 5, 12, 30, 10_000):
        left[0] = room
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with suppress(DataError) if room > 1000 else pytest.raises(DataError, match="No space left on device"):
                go(pictures, out)
    assert left[0] > 0
    same(out, whole)


def test_questions_that_are_left_open_are_another_workers(tmp_path, pictures, whole):
    out = tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: OSError(errno.EIO, "trouble") if (20, 0, 0) in [c for c, _ in batch] else None)
    with pytest.raises(PassingError, match=r"1 questions are left open, the first about 0020\.png"):
        go(pictures, out, vlm)
    with pytest.raises(DataError, match=r"1[67] pictures are not done|blocks that are not done: 1;"):
        merge(out)
    other = FakeVLM(broken=[colour(3)])
    go(pictures, out, other)
    assert names(other) == [20]
    merge(out)
    assert len(answers(out)) == 69


def test_a_worker_that_can_answer_nothing_ends_and_notes_nothing(tmp_path, pictures, whole):
    out = tmp_path / "out"
    with pytest.raises(SystematicError):
        go(pictures, out, FakeVLM(fails=lambda batch: RuntimeError("renamed")))
    go(pictures, out)
    same(out, whole)


def test_a_lonely_odd_picture_is_held_against_what_others_answered(tmp_path, pictures):
    out, odd = tmp_path / "out", colour(20)
    left = FakeVLM(fails=lambda batch: OSError(errno.EIO, "x") if odd in [c for c, _ in batch] else None)
    with pytest.raises(PassingError):
        go(pictures, out, left)
    go(pictures, out, FakeVLM(fails=lambda batch: RuntimeError("odd") if odd in [c for c, _ in batch] else None))
    merge(out)
    assert ("0020.png", "RuntimeError: odd") in [(line["image"], line["reason"]) for line in failures(out)]


def test_a_table_with_prompts_and_prompts_for_names(tmp_path, pictures):
    table = tmp_path / "t.csv"
    rows = [("0001.png", "A?"), ("0002.png", "A?"), ("0001.png", "B?"), ("0007.png", "A?"), ("0001.png", "A?")]
    rows += [(f"{number:04d}.png", "A?") for number in range(10, 40)] + [("0007.png", "B?"), ("0002.png", "C?")]
    table.write_text("image,prompt\n" + "".join(f"in/{image},{prompt}\n" for image, prompt in rows))
    questions = Questions.of(source_of(table))
    go(table, tmp_path / "out", questions=questions)
    assert merge(tmp_path / "out").unlisted == ""
    asked = {(f"in/{image}", prompt) for image, prompt in rows if image != "0007.png"}
    found = [(line["image"], line["prompt"]) for line in answers(tmp_path / "out")]
    assert (len(found), set(found)) == (len(asked), asked)
    assert [line["image"] for line in failures(tmp_path / "out")] == ["in/0007.png"]
    (tmp_path / "p.csv").write_text("image,prompt\n0002.png,A?\n0001.png,B?\n0002.png,C?\n")
    named = Questions.file(tmp_path / "p.csv")
    go(pictures, tmp_path / "named", questions=named)
    assert merge(tmp_path / "named").totals.answers == 3
    (tmp_path / "p.csv").write_text("image,prompt\ngone.png,A?\n")
    with pytest.raises(UsageError, match=r"not in the folder: gone\.png"):
        go(pictures, tmp_path / "gone", questions=Questions.file(tmp_path / "p.csv"))


def test_two_planners_plan_no_question_twice(tmp_path, pictures):
    """Another one plans all, before the first has published what it has in hand; then the other way round."""
    folder, source = BlockFolder(tmp_path / "out"), source_of(pictures)
    folder.make()

    class Silent:
        name, is_planning = "w", False

        def plans(self, planning):
            pass

        def planned(self):
            pass

    def plan(source):
        found = planner.Planner(folder, Silent(), source, WHAT)
        found._write()

    class Interrupted:
        place, repeats, prompts = source.place, False, None

        def __iter__(self):
            for number, file in enumerate(source):
                if number == 21:
                    plan(source)
                yield file

    plan(Interrupted())
    numbers, end = folder.planned()
    assert end == numbers[-1]
    planned = [file.name for number in numbers for file in folder.pictures(number, source.place)]
    assert (len(planned), set(planned)) == (COUNT, {f"{number:04d}.png" for number in range(COUNT)})
    assert folder.head(end) == (COUNT, 0)


def test_workers_of_another_kind_are_refused(tmp_path, pictures, monkeypatch):
    out = tmp_path / "out"
    go(pictures, out)
    with pytest.raises(UsageError, match="seed was 0, now 1"):
        go(pictures, out, seed=1)
    draw(pictures, COUNT + 1)
    with monkeypatch.context() as patch:
        patch.setattr(FakeVLM, "revision", "other")
        with pytest.raises(UsageError, match="weights was 'commit:abc', now 'commit:other'"):
            go(pictures, out)
    go(pictures, out)
    merge(out)
    run(pictures, tmp_path / "one", questions=WHAT, settings=Settings(), batch_size=4, loader=FakeVLM().load)
    with pytest.raises(UsageError, match="holds answers that a run wrote itself"):
        go(pictures, tmp_path / "one")
    run(
        pictures,
        tmp_path / "split",
        questions=WHAT,
        settings=Settings(),
        batch_size=4,
        shard=Shard(0, 2),
        loader=FakeVLM().load,
    )
    with pytest.raises(UsageError, match="holds the shard 0/2"):
        go(pictures, tmp_path / "split")
    with pytest.raises(UsageError, match="workers share the run"):
        run(
            pictures,
            out,
            questions=WHAT,
            settings=Settings(),
            batch_size=4,
            shard=Shard(0, 2),
            loader=FakeVLM().load,
        )


def test_merge_says_what_is_missing_and_refuses_what_is_wrong(tmp_path, pictures):
    out, blocks = tmp_path / "out", BlockFolder(tmp_path / "out")
    (out / "blocks").mkdir(parents=True)
    with pytest.raises(DataError, match="no worker has answered anything"):
        merge(out)
    go(pictures, out)
    third = blocks.done / "00000003"
    third.rename(tmp_path / "third")
    with pytest.raises(DataError, match=r"blocks that are not done: 3; 16 pictures are not done: 0048\.png, 0049"):
        merge(out)
    (tmp_path / "third").rename(third)
    draw(pictures, COUNT + 2)
    with pytest.raises(DataError, match=r"2 pictures are not done: 0070\.png, 0071\.png"):
        merge(out)
    for number in (70, 71):
        (pictures / f"00{number}.png").unlink()
    lines = (third / "lines.jsonl").read_text().splitlines(keepends=True)
    for text, words in (
        ("".join(lines[1:]), r"1 pictures are not done: 0048\.png"),
        ("".join([*lines, lines[2]]), r"0050\.png stands twice"),
        ("".join([*lines, lines[2].replace("0050", "0001")]), r"0001\.png in .* does not belong to block 3"),
    ):
        (third / "lines.jsonl").write_text(text)
        with pytest.raises(DataError, match=words):
            merge(out)
    (third / "lines.jsonl").write_text("".join(lines))
    (name,) = blocks.cards()
    card = blocks.card(name)
    replace_json(blocks.workers / "x.json", card | {"settings": card["settings"] | {"dtype": "bfloat16"}})
    with pytest.raises(DataError, match="answered with other settings: dtype is 'float32' and 'bfloat16'"):
        merge(out)
    (blocks.workers / "x.json").unlink()
    assert merge(out).totals.answers == 68
    pictures.rename(tmp_path / "moved")
    assert "cannot read" in merge(out).unlisted


def test_how_far_it_is_and_who_is_at_it(tmp_path, pictures, monkeypatch):
    out = tmp_path / "out"
    with stuck(pictures, out, monkeypatch):
        found = read_shared(out)
        assert (found.running, found.finished, found.total) == (True, False, 70)
        assert 10 <= found.answers + found.failed == 70 - found.left <= 13
        assert [worker.state for worker in found.workers] == ["running"]
        (name,) = BlockFolder(out).cards()
        card = BlockFolder(out).card(name)
        replace_json(out / "blocks" / "workers" / f"{name}.json", card | {"updated": "2026-01-01T00:00:00+00:00"})
        assert [worker.state for worker in read_shared(out).workers] == ["silent"]
    found = read_shared(out)
    assert (found.running, found.finished, found.answers, found.failed, found.left) == (False, True, 68, 2, 0)
    assert [worker.state for worker in found.workers] == ["ended"]


def test_the_commands(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 6), tmp_path / "out"
    options = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 2, "--steal")
    for more in (("--shard", "0/2"), ("--retry-failed",), ("--format", "csv"), ("--save-maps", tmp_path / "maps")):
        code, _, told = vlmfix(*options, *more)
        assert (code, f"vlmfix: {more[0]} does not go with --steal" in told) == (2, True)
    code, _, told = vlmfix(*options)
    assert (code, "this worker wrote 6 answers; 1 of 1 blocks are done" in told) == (0, True)
    found = json.loads(vlmfix("status", out, "--json")[1])
    assert (found["state"], found["answers"], found["total"], found["left"]) == ("finished", 6, 6, 0)
    assert [(worker["state"], worker["answers"]) for worker in found["workers"]] == [("ended", 6)]
    assert "workers: 0 running, 0 hung, 0 silent, 1 ended" in vlmfix("status", out)[1]
    code, printed, told = vlmfix("merge", out)
    assert (code, printed, told) == (0, "", f"vlmfix: 6 answers and 0 failures of 1 workers are in {out}\n")
    assert json.loads(vlmfix("status", out, "--json")[1])["total"] == 6
