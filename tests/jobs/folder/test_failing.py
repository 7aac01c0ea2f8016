"""Errors of every question end a run and leave nothing behind; those of single questions are noted, and asked again."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.deadly import die_at
from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import go, living
from tests.processes import ended
from vlmfix import images
from vlmfix.answering import FAILURES_IN_A_ROW
from vlmfix.errors import DataError, LayoutError, PassingError, SystematicError, UsageError
from vlmfix.records import read_json, read_lines


def answered(out):
    return [record["image"] for record in read_lines(out / "answers.jsonl")]


def failed(out):
    return {record["image"]: record["reason"] for record in read_lines(out / "failed.jsonl")}


def names(*numbers):
    return [f"{number:04d}.png" for number in numbers]


def renamed(batch):
    return AttributeError("'Processor' object has no attribute 'patches'")


def odd(*numbers):
    """The image processor cannot take some pictures; the text of its error differs from picture to picture."""
    colours = {colour(number) for number in numbers}

    def fails(batch):
        found = [shown for shown, _ in batch if shown in colours]
        return ValueError(f"cannot resize {found[0]}") if found else None

    return fails


def never(*_, **__):
    pytest.fail("asked again")


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_an_error_of_every_question_ends_the_run(tmp_path, count, batch_size):
    pictures, out, vlm = draw(tmp_path / "in", count), tmp_path / "out", FakeVLM(fails=renamed)
    for _ in range(2):
        with pytest.raises(SystematicError, match="'Processor' object has no attribute 'patches'"):
            go(pictures, out, vlm, batch_size=batch_size)
        assert (answered(out), failed(out)) == ([], {})
        assert read_json(out / "run.json")["finished"] is False
    assert len({shown for batch in vlm.batches for shown, _ in batch}) <= max(batch_size, FAILURES_IN_A_ROW)
    end = go(pictures, out, FakeVLM(), batch_size=batch_size)
    assert (answered(out), failed(out)) == (names(*range(count)), {})
    assert (end.done, end.totals.answers, end.totals.failed) == (count, count, 0)


def test_the_error_names_what_went_wrong_and_where(tmp_path):
    with pytest.raises(SystematicError) as stopped:
        go(draw(tmp_path / "in", 20), tmp_path / "out", FakeVLM(fails=renamed))
    assert stopped.value.message.startswith("8 questions in a row failed with greedy and no other is answered: ")
    assert "AttributeError: 'Processor' object has no attribute 'patches' (" in stopped.value.message
    assert "tests/jobs/fake.py, line " in stopped.value.message
    assert "vlmfix doctor tiny" in stopped.value.hint
    assert "raise problem" in stopped.value.__notes__[0]  # the traceback, for --debug


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_error_that_begins_in_the_middle_costs_no_question(tmp_path, batch_size):
    pictures, out = draw(tmp_path / "in", 40), tmp_path / "out"
    asked = []

    def fails(batch):
        asked.extend(batch)
        return renamed(batch) if len(asked) > 17 else None

    with pytest.raises(SystematicError, match=f"{FAILURES_IN_A_ROW} questions in a row"):
        go(pictures, out, FakeVLM(fails=fails), batch_size=batch_size)
    before = answered(out)
    assert before == names(*range(17 // batch_size * batch_size))
    assert failed(out) == {}
    with pytest.raises(SystematicError):
        go(pictures, out, FakeVLM(fails=renamed), batch_size=batch_size)
    assert (answered(out), failed(out)) == (before, {})
    go(pictures, out, FakeVLM(), batch_size=batch_size)
    assert (answered(out), failed(out)) == (names(*range(40)), {})


def test_an_error_that_begins_with_the_last_questions_costs_none_of_them(tmp_path):
    pictures, out = draw(tmp_path / "in", 6), tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: renamed(batch) if len(vlm.batches) > 1 else None)
    with pytest.raises(SystematicError, match="2 questions in a row"):
        go(pictures, out, vlm)
    assert (answered(out), failed(out)) == (names(0, 1, 2, 3), {})


@pytest.mark.parametrize("places", [(0,), (3,), (7,), (0, 1, 6), (2, 3, 4, 7)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_odd_pictures_stay_failures_of_their_own(tmp_path, places, batch_size):
    pictures, out = draw(tmp_path / "in", 8), tmp_path / "out"
    end = go(pictures, out, FakeVLM(fails=odd(*places)), batch_size=batch_size)
    assert answered(out) == names(*(n for n in range(8) if n not in places))
    assert failed(out) == {name: f"ValueError: cannot resize {colour(int(name[:4]))}" for name in names(*places)}
    assert (end.done, end.totals.failed, read_json(out / "run.json")["finished"]) == (8, len(places), True)
    vlm = FakeVLM()
    vlm.load = never
    go(pictures, out, vlm)


def test_a_crowd_of_odd_pictures_does_not_block_the_folder(tmp_path):
    pictures, out = draw(tmp_path / "in", 40), tmp_path / "out"
    crowd = range(5, 5 + 3 * FAILURES_IN_A_ROW)
    go(pictures, out, FakeVLM(fails=odd(*crowd)))
    assert list(failed(out)) == names(*crowd)
    assert len(answered(out)) == 40 - len(crowd)


def test_an_odd_picture_that_is_left_over_does_not_block_the_folder(tmp_path):
    pictures, out = draw(tmp_path / "in", 4), tmp_path / "out"
    go(pictures, out, FakeVLM())
    draw(pictures, 5)
    (pictures / "0000.png").write_bytes(b"broken since it was answered")
    (pictures / "0001.png").unlink()
    go(pictures, out, FakeVLM(fails=odd(4)))
    assert (answered(out), list(failed(out))) == (names(0, 1, 2, 3), names(4))


@pytest.mark.parametrize("error", [DataError("no picture"), LayoutError("row 0")])
def test_failures_that_are_known_to_be_the_questions_own_end_no_run(tmp_path, error):
    pictures, out = draw(tmp_path / "in", 30), tmp_path / "out"
    end = go(pictures, out, FakeVLM(fails=lambda batch: error))
    assert (answered(out), len(failed(out)), end.done) == ([], 30, 30)


def test_files_that_are_no_pictures_end_no_run(tmp_path):
    pictures, out = draw(tmp_path / "in", 1), tmp_path / "out"
    for number in range(100):
        (pictures / f"x{number}.png").write_bytes(b"broken")
    go(pictures, out, FakeVLM())
    assert len(failed(out)) == 100


def test_answers_that_are_no_numbers_end_no_run(tmp_path):
    pictures, out = draw(tmp_path / "in", 20), tmp_path / "out"
    go(pictures, out, FakeVLM(broken=[colour(number) for number in range(20)]))
    assert set(failed(out).values()) == {"the model's output was not a number"}


def test_failures_of_both_kinds_keep_their_reasons(tmp_path):
    pictures, out = draw(tmp_path / "in", 12), tmp_path / "out"
    strange = odd(2, 5)

    def fails(batch):
        return DataError("no such shape") if any(shown == colour(3) for shown, _ in batch) else strange(batch)

    go(pictures, out, FakeVLM(fails=fails), batch_size=1)
    assert failed(out) == {
        "0002.png": f"ValueError: cannot resize {colour(2)}",
        "0003.png": "no such shape",
        "0005.png": f"ValueError: cannot resize {colour(5)}",
    }


def test_waiting_failures_keep_no_pictures(tmp_path, monkeypatch):
    alive, most = living(monkeypatch), []

    def fails(batch):
        most.append(len(alive))
        return ValueError("odd") if len(most) == 1 else LayoutError("strange")

    with pytest.raises(SystematicError):  # one odd picture, and no answer that would show that it is one
        go(draw(tmp_path / "in", 60), tmp_path / "out", FakeVLM(fails=fails), batch_size=1)
    assert max(most) <= images.AHEAD + 2 + 1


# -- asked again


def spoiled(base):
    """A finished folder: eight answers, two odd pictures and a broken file."""
    pictures, out = draw(base / "in", 10), base / "out"
    (pictures / "broken.png").write_bytes(b"")
    go(pictures, out, FakeVLM(fails=odd(2, 9)))
    assert list(failed(out)) == [*names(2), "broken.png", *names(9)]
    return pictures, out


def test_failed_questions_are_asked_again_and_no_others(tmp_path):
    pictures, out = spoiled(tmp_path)
    draw(pictures, 11)
    Image.new("RGB", (8, 8), colour(11)).save(pictures / "broken.png")
    vlm, seen = FakeVLM(), []
    end = go(pictures, out, vlm, retry_failed=True, report=lambda progress: seen.append(progress.totals.failed))
    assert [shown for batch in vlm.batches for shown, _ in batch] == [colour(number) for number in (2, 9, 10, 11)]
    assert answered(out) == [*names(0, 1, 3, 4, 5, 6, 7, 8, 2, 9, 10), "broken.png"]
    assert failed(out) == {}
    assert (end.before, end.done, end.totals.answers, end.totals.failed, set(seen)) == (8, 12, 12, 0, {0})
    card = read_json(out / "run.json")
    assert (card["finished"], card["totals"]["answers"], card["totals"]["failed"]) == (True, 12, 0)
    vlm.load = never
    go(pictures, out, vlm, retry_failed=True)


def test_what_fails_again_is_noted_once(tmp_path):
    pictures, out = spoiled(tmp_path)
    before = [json.dumps(record, sort_keys=True) for record in read_lines(out / "failed.jsonl")]
    for _ in range(2):
        end = go(pictures, out, FakeVLM(fails=odd(2, 9)), retry_failed=True)
        again = [json.dumps(record, sort_keys=True) for record in read_lines(out / "failed.jsonl")]
        assert sorted(again) == sorted(before)
        assert (end.done, end.totals.failed) == (11, 3)
    assert len(answered(out)) == 8


def test_failures_remain_where_nobody_asks_for_them(tmp_path):
    pictures, out = spoiled(tmp_path)
    vlm = FakeVLM()
    vlm.load = never
    end = go(pictures, out, vlm)
    assert (end.done, end.totals.failed, len(failed(out))) == (11, 3, 3)


def test_failures_remain_when_the_model_cannot_be_loaded(tmp_path):
    class Gone(FakeVLM):
        def load(self, model, **_):
            raise DataError("cannot load")

    pictures, out = spoiled(tmp_path)
    before = (out / "failed.jsonl").read_bytes()
    with pytest.raises(DataError, match="cannot load"):
        go(pictures, out, Gone(), retry_failed=True)
    assert (out / "failed.jsonl").read_bytes() == before


def test_asking_again_with_every_question_failing_stops_too(tmp_path):
    pictures, out = spoiled(tmp_path)
    with pytest.raises(SystematicError):
        go(pictures, out, FakeVLM(fails=renamed), retry_failed=True)
    assert not set(failed(out)) & set(names(2, 9))
    assert read_json(out / "run.json")["finished"] is False
    go(pictures, out, FakeVLM())
    assert sorted(answered(out)) == names(*range(10))
    assert list(failed(out)) == ["broken.png"]


def test_failures_without_a_card_are_not_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "failed.jsonl").write_text('{"image": "a", "reason": "mine"}\n')
    with pytest.raises(UsageError, match=r"no run\.json"):
        go(draw(tmp_path / "in", 2), out, FakeVLM(), retry_failed=True)
    assert "mine" in (out / "failed.jsonl").read_text()


def killed_at(step, pictures, out):
    """Asks again, in a process that dies just before one of the calls that change the folder."""
    die_at(step)
    go(pictures, out, FakeVLM(), retry_failed=True)


@pytest.mark.parametrize("retry_again", [False, True])
def test_killed_while_it_asks_again(tmp_path, retry_again):
    pictures, whole = spoiled(tmp_path)
    before = answered(whole)
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        out = tmp_path / f"out{step}"
        shutil.copytree(whole, out)
        code = ended(killed_at, step, pictures, out)
        assert answered(out)[: len(before)] == before
        assert set(failed(out)) <= {*names(2, 9), "broken.png"}
        go(pictures, out, FakeVLM(), retry_failed=retry_again or "0002.png" in failed(out))
        assert (sorted(answered(out)), list(failed(out))) == (names(*range(10)), ["broken.png"])
        assert sorted(os.listdir(out)) == ["answers.jsonl", "failed.jsonl", "run.json"]
        card = read_json(out / "run.json")
        assert (card["finished"], card["totals"]["answers"], card["totals"]["failed"]) == (True, 10, 1)
        step += 1
    assert code == 0
    assert step > 10


# -- trouble that passes


def full(*_):
    raise OSError(errno.EMFILE, "Too many open files")


TROUBLE = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    *(OSError(getattr(errno, name), name) for name in ("EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ENETDOWN")),
]


@pytest.fixture
def _no_pauses(monkeypatch):
    monkeypatch.setattr(images, "PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("error", TROUBLE)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_trouble_that_passes_is_no_fault_of_the_question(tmp_path, error, batch_size):
    pictures, out = draw(tmp_path / "in", 6), tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: error if any(shown == colour(2) for shown, _ in batch) else None)
    with pytest.raises(PassingError, match=r"1 questions are left open, the first about 0002.png: ") as stopped:
        go(pictures, out, vlm, batch_size=batch_size)
    assert "the same command asks them again" in stopped.value.hint
    assert (answered(out), failed(out)) == (names(0, 1, 3, 4, 5), {})
    assert read_json(out / "run.json")["finished"] is False
    end = go(pictures, out, FakeVLM(), batch_size=batch_size)
    assert (sorted(answered(out)), failed(out)) == (names(*range(6)), {})
    assert (end.before, end.done, end.answered, read_json(out / "run.json")["finished"]) == (5, 6, 1, True)


def test_trouble_that_is_over_at_once_is_not_seen(tmp_path):
    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: TROUBLE[1] if len(vlm.batches) == 2 else None)
    go(pictures, out, vlm, batch_size=1)
    assert (answered(out), failed(out)) == (names(0, 1, 2), {})


@pytest.mark.parametrize("error", TROUBLE)
def test_trouble_of_every_question_ends_the_run(tmp_path, error):
    pictures, out, vlm = draw(tmp_path / "in", 30), tmp_path / "out", FakeVLM(fails=lambda batch: error)
    with pytest.raises(PassingError, match=f"{FAILURES_IN_A_ROW} questions in a row are left open"):
        go(pictures, out, vlm)
    assert (answered(out), failed(out)) == ([], {})
    assert len({shown for batch in vlm.batches for shown, _ in batch}) <= FAILURES_IN_A_ROW
    go(pictures, out, FakeVLM())
    assert len(answered(out)) == 30


def test_trouble_beside_odd_pictures_costs_neither(tmp_path):
    pictures, out = draw(tmp_path / "in", 9), tmp_path / "out"
    strange = odd(1, 4)

    def fails(batch):
        return MemoryError() if any(shown == colour(5) for shown, _ in batch) else strange(batch)

    with pytest.raises(PassingError):
        go(pictures, out, FakeVLM(fails=fails), batch_size=1)
    assert list(failed(out)) == names(1, 4)
    assert answered(out) == names(0, 2, 3, 6, 7, 8)


def test_a_question_that_shows_whether_the_model_works_may_meet_trouble(tmp_path):
    pictures, out = draw(tmp_path / "in", 4), tmp_path / "out"
    vlm = FakeVLM(
        fails=lambda batch: ValueError("odd") if (colour(3), "What?") in batch else vlm.trouble(len(vlm.batches))
    )
    vlm.trouble = lambda number: MemoryError() if number > 4 else None
    with pytest.raises(PassingError, match="out of memory"):
        go(pictures, out, vlm, batch_size=1)
    assert (answered(out), failed(out)) == (names(0, 1, 2), {})


@pytest.mark.usefixtures("_no_pauses")
@pytest.mark.parametrize("error", [e for e in TROUBLE if isinstance(e, MemoryError | OSError)])
def test_pictures_that_cannot_be_opened_now_are_opened_later(tmp_path, monkeypatch, error):
    pictures, out = draw(tmp_path / "in", 8), tmp_path / "out"
    (pictures / "broken.png").write_bytes(b"broken")
    real = Image.open

    def opened(file, **options):
        if Path(file.name).name in ("0002.png", "0005.png"):
            raise error
        return real(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", opened)
        with pytest.raises(PassingError, match=r"2 questions are left open, the first about 0002.png"):
            go(pictures, out, FakeVLM())
    assert (answered(out), list(failed(out))) == (names(0, 1, 3, 4, 6, 7), ["broken.png"])
    go(pictures, out, FakeVLM())
    assert (sorted(answered(out)), list(failed(out))) == (names(*range(8)), ["broken.png"])


@pytest.mark.usefixtures("_no_pauses")
def test_a_network_folder_that_is_away_ends_the_run(tmp_path, monkeypatch):
    pictures, out = draw(tmp_path / "in", 30), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: full())
        with pytest.raises(PassingError, match="8 questions in a row are left open: Too many open files"):
            go(pictures, out, FakeVLM())
    assert (answered(out), failed(out)) == ([], {})
    draw(pictures / "sub", 1)
    listed = os.listdir
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: full() if Path(path).name == "sub" else listed(path))
        with pytest.raises(PassingError, match=r"cannot list .*sub: Too many open files"):
            go(pictures, out, FakeVLM())
    go(pictures, out, FakeVLM())
    assert len(answered(out)) == 31


def test_trouble_behind_an_error_of_ours_passes_too(tmp_path):
    pictures, out = draw(tmp_path / "in", 2), tmp_path / "out"
    behind = DataError("cannot read the profile")
    behind.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    with pytest.raises(PassingError, match="Stale file handle"):
        go(pictures, out, FakeVLM(fails=lambda batch: behind if (colour(1), "What?") in batch else None))
    assert (answered(out), failed(out)) == (names(0), {})


def test_a_start_that_answers_nothing_says_so(tmp_path):
    pictures, out = draw(tmp_path / "in", 2), tmp_path / "out"
    assert go(pictures, out, FakeVLM(fails=lambda batch: DataError("no"))).in_vain
    assert go(pictures, out, FakeVLM()).in_vain  # nothing is left to ask, and nothing is answered
    assert not go(pictures, out, FakeVLM(), retry_failed=True).in_vain
    draw(pictures, 3)
    assert go(pictures, out, FakeVLM(fails=lambda batch: DataError("no"))).in_vain
    assert not go(pictures, out, FakeVLM()).in_vain
