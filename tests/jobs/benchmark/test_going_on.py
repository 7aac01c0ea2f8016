"""An evaluation that is gone on with: the same one, whatever ended it, and no other."""

import shutil
import signal
import time
from dataclasses import replace

import pytest
from PIL import Image

from tests.evals.fake import Says, workload
from tests.jobs.benchmark.asked import files, go
from tests.jobs.fake import FakeVLM
from tests.processes import server
from vlmfix.decoders import VCD
from vlmfix.errors import DataError, UsageError
from vlmfix.evals import tasks
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings


@pytest.mark.parametrize("kept", [0, 1, 5, 11, 17, 24])
@pytest.mark.parametrize("torn", [b"", b'{"id": "a/'])
def test_a_resumed_run_is_the_uninterrupted_one_byte_for_byte(tmp_path, kept, torn):
    work = workload(tmp_path / "in")
    whole = tmp_path / "whole"
    go(whole, work, FakeVLM(), arms=("vcd",))
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    path = cut / "greedy" / "answers.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]) + torn)
    (cut / "vcd" / "answers.jsonl").unlink()
    vlm = FakeVLM()
    go(cut, work, vlm, arms=("vcd",), batch_size=None)
    assert files(cut) == files(whole)
    full = [tuple(batch) for batch in _batches(work)]
    assert {tuple(batch) for batch in vlm.batches} <= set(full)  # a batch that was cut is answered as a whole


def _batches(work):
    vlm = FakeVLM()
    go(work.images.parent / "again", work, vlm)
    return vlm.batches


def test_a_finished_run_loads_no_model(tmp_path):
    work = workload(tmp_path / "in")
    go(tmp_path / "out", work, FakeVLM())

    class Never:
        def load(self, *_, **__):
            raise AssertionError("loaded")

    run = go(tmp_path / "out", work, Never())
    assert run.missing("greedy") == 0


@pytest.mark.parametrize("interrupt", [1, 3, 7, 10])
def test_an_interrupted_run_leaves_a_true_card(tmp_path, interrupt):
    out = tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt() if len(vlm.batches) == interrupt else None, seconds=0.001)
    with pytest.raises(KeyboardInterrupt):
        go(out, workload(tmp_path / "in"), vlm, arms=("vcd",))
    (session,) = read_json(out / "card.json")["sessions"]
    assert list(session["arms"]) == ["greedy", "vcd"][: 1 + interrupt // 6]  # an arm is five batches
    for arm, timing in session["arms"].items():
        lines = read_lines(out / arm / "answers.jsonl")
        assert timing["tokens"] == sum(len(line["ids"]) for line in lines)
        assert timing["seconds"] > 0


def test_a_report_that_ends_the_run_costs_no_answer(tmp_path):
    def report(done, total):
        if done == 3:
            raise KeyboardInterrupt

    vlm, out, work = FakeVLM(), tmp_path / "out", workload(tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        go(out, work, vlm, report=report)
    (session,) = read_json(out / "card.json")["sessions"]
    written = list(read_lines(out / "greedy" / "answers.jsonl"))
    assert len(vlm.batches) == 1
    assert len(written) == 6  # of the batch's four questions, two of which stand in two splits
    assert session["arms"]["greedy"]["tokens"] == sum(len(line["ids"]) for line in written)
    go(out, work, vlm)
    assert len(vlm.batches) == 5  # no question was asked again


def test_an_arm_can_be_added(tmp_path):
    work = workload(tmp_path / "in")
    go(tmp_path / "out", work, FakeVLM())
    vlm = FakeVLM()
    run = go(tmp_path / "out", work, vlm, arms=("vcd:contrast=0.5",))
    assert list(run.answers) == ["greedy", "vcd:contrast=0.5"]
    assert sum(map(len, vlm.batches)) == 18
    run = go(tmp_path / "out", work, vlm)
    assert list(run.answers) == ["greedy", "vcd:contrast=0.5"]


def test_an_arm_is_not_added_where_the_pictures_are_others_meanwhile(tmp_path):
    work = workload(tmp_path / "in", 9)
    go(tmp_path / "out", work, FakeVLM())
    for number in (0, 2, 3, 4, 5, 8):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "in" / f"{number:04d}.png")
    never = FakeVLM(fails=lambda batch: AssertionError("asked"))
    with pytest.raises(DataError, match=r"6 of 9 pictures in .* 0000.png, 0002.png, .*, 0005.png and 1 more"):
        go(tmp_path / "out", work, never, arms=("vcd",))
    assert list(read_json(tmp_path / "out" / "card.json")["arms"]) == ["greedy"]
    assert go(tmp_path / "out", work, never).missing("greedy") == 0, "nothing is left to ask"


def test_a_stopped_run_does_not_go_on_with_other_pictures(tmp_path):
    work = workload(tmp_path / "in")
    go(tmp_path / "out", work, FakeVLM())
    path = tmp_path / "out" / "greedy" / "answers.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "0000.png")
    with pytest.raises(DataError, match=r"1 of 6 pictures"):
        go(tmp_path / "out", work, FakeVLM())


def test_a_picture_that_could_not_be_opened_may_be_mended(tmp_path):
    work = workload(tmp_path / "in")
    whole = (tmp_path / "in" / "0001.png").read_bytes()
    (tmp_path / "in" / "0001.png").write_bytes(b"broken")
    assert go(tmp_path / "out", work, FakeVLM()).failed("greedy") == 4
    (tmp_path / "in" / "0001.png").write_bytes(whole)
    run = evaluate(tmp_path / "out", Says(), work, Settings(), {}, retry_failed=True, loader=FakeVLM().load)
    assert run.failed("greedy") == 0


def test_the_folder_of_the_pictures_may_be_another_one(tmp_path):
    work = workload(tmp_path / "in")
    go(tmp_path / "out", work, FakeVLM())
    (tmp_path / "in").rename(tmp_path / "moved")
    run = go(tmp_path / "out", replace(work, images=tmp_path / "moved"), FakeVLM(), arms=("vcd",))
    assert run.missing("vcd") == 0
    assert run.card["images"] == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "decoding"),
        ({"max_new_tokens": 3}, "decoding"),
        ({"model": "other"}, "model"),
        ({"task": Says(upper=True)}, "options"),
        ({"batch_size": 5}, "batch_size"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, named):
    work = workload(tmp_path / "in")
    go(tmp_path / "out", work, FakeVLM())
    path = tmp_path / "out" / "greedy" / "answers.jsonl"
    path.write_bytes(b"")  # otherwise nothing is left to do, and the batch size does not matter
    with pytest.raises(UsageError, match=named):
        go(tmp_path / "out", work, FakeVLM(), **change)


def test_other_samples_are_refused(tmp_path):
    work = workload(tmp_path / "in")
    go(tmp_path / "out", work, FakeVLM())
    with pytest.raises(UsageError, match="samples was"):
        go(tmp_path / "out", replace(work, samples=work.samples[1:]), FakeVLM())
    with pytest.raises(UsageError, match=r"data.data was 'drawn', now 'other'"):
        go(tmp_path / "out", replace(work, about={"data": "other"}), FakeVLM())
    with pytest.raises(UsageError, match=r"data.data was 'drawn', now None"):
        go(tmp_path / "out", replace(work, about={}), FakeVLM())
    with pytest.raises(UsageError) as refused:
        go(tmp_path / "out", replace(work, about={"data": "long " * 1000}), FakeVLM())
    assert len(refused.value.message) < 300


def test_an_arm_with_other_parameters_under_the_same_name_is_refused(tmp_path):
    work = workload(tmp_path / "in")
    vlm = FakeVLM()
    evaluate(tmp_path / "out", Says(), work, Settings(), {"mine": VCD(contrast=0.5)}, batch_size=4, loader=vlm.load)
    with pytest.raises(UsageError, match=r"mine.parameters.contrast was 0.5, now 0.6"):
        evaluate(tmp_path / "out", Says(), work, Settings(), {"mine": VCD(contrast=0.6)}, batch_size=4, loader=vlm.load)


def slowly(base):
    """Runs in a process of its own, to be killed."""
    tasks.TASKS.homes["says"] = "tests.evals.fake:Says"
    go(base / "out", workload(base / "in", 20), FakeVLM(seconds=0.004), arms=("vcd",))


def test_killed_at_any_moment(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    go(whole / "out", workload(whole / "in", 20), FakeVLM(), arms=("vcd",))
    kills, code = 0, None
    while code != 0:
        process = server().Process(target=slowly, args=(killed,))
        process.start()
        enough, deadline = _lines(killed) + 23, time.monotonic() + 60
        while process.is_alive() and _lines(killed) < enough and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills >= 3
    assert files(killed / "out") == files(whole / "out")
    assert len(read_json(killed / "out" / "card.json")["sessions"]) >= kills


def _lines(base):
    return sum(path.read_bytes().count(b"\n") for path in base.glob("out/*/answers.jsonl"))
