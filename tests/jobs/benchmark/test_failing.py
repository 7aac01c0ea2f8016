"""Errors of every question end an evaluation and leave nothing behind; failures of single samples are asked again."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.deadly import die_at
from tests.evals.fake import workload
from tests.jobs.benchmark.asked import go
from tests.jobs.fake import FakeVLM, colour
from tests.processes import ended
from vlmfix import images
from vlmfix.answering import FAILURES_IN_A_ROW
from vlmfix.errors import LayoutError, PassingError, SystematicError
from vlmfix.evals import tasks
from vlmfix.evals.record import read_run
from vlmfix.jobs.benchmark.reproduce import reproduce
from vlmfix.records import read_lines


def renamed(batch):
    return AttributeError("'Processor' object has no attribute 'patches'")


def odd(*numbers, error=ValueError):
    colours = {colour(number) for number in numbers}
    return lambda batch: error("odd") if any(shown in colours for shown, _ in batch) else None


def files(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("answers.jsonl"))}


def failed(run, arm="greedy"):
    return {name for name, record in run.answers[arm].items() if record.failed}


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("pictures", [1, 6])
def test_an_error_of_every_question_ends_the_run(tmp_path, pictures, batch_size):
    work, out = workload(tmp_path / "in", pictures), tmp_path / "out"
    for _ in range(2):
        with pytest.raises(SystematicError, match="AttributeError: 'Processor' object has no attribute 'patches'"):
            go(out, work, FakeVLM(fails=renamed), arms=("vcd",), batch_size=batch_size)
        assert set(files(out).values()) == {b""}
    go(out, work, FakeVLM(), arms=("vcd",), batch_size=batch_size)
    go(tmp_path / "whole", work, FakeVLM(), arms=("vcd",), batch_size=batch_size)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("after", [1, 7, 10, 17, 18, 30])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_error_that_begins_in_the_middle_costs_no_question(tmp_path, after, batch_size):
    work, out, asked = workload(tmp_path / "in"), tmp_path / "out", []

    def fails(batch):
        asked.extend(batch)
        return renamed(batch) if len(asked) > after else None

    with pytest.raises(SystematicError):
        go(out, work, FakeVLM(fails=fails), arms=("vcd",), batch_size=batch_size)
    assert b"failed" not in b"".join(files(out).values())
    go(out, work, FakeVLM(), arms=("vcd",), batch_size=batch_size)
    go(tmp_path / "whole", work, FakeVLM(), arms=("vcd",), batch_size=batch_size)
    assert files(out) == files(tmp_path / "whole")


def test_an_error_of_one_decoder_is_not_excused_by_another(tmp_path):
    class Contrast(FakeVLM):
        def generate(self, pictures, prompts, *, decoder, **options):
            if decoder.name == "vcd":
                raise AttributeError("no contrast")
            return super().generate(pictures, prompts, **options)

    work, out = workload(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(SystematicError, match="failed with vcd:"):
        go(out, work, Contrast(), arms=("vcd",))
    assert files(out)[Path("vcd/answers.jsonl")] == b""
    assert read_run(out).missing("greedy") == 0


@pytest.mark.parametrize("numbers", [(3,), (5,), (1, 2), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("kept", [0, 1, 5, 11, 17, 23])
def test_odd_pictures_are_recorded_in_their_places_after_any_kill(tmp_path, numbers, kept):
    work, whole, cut = workload(tmp_path / "in"), tmp_path / "whole", tmp_path / "cut"
    vlm = FakeVLM(fails=odd(*numbers))
    run = go(whole, work, vlm)
    asked = [("shared", "a"), ("shared", "b"), ("only a", "a"), ("only b", "b")]
    lines = list(read_lines(whole / "greedy" / "answers.jsonl"))
    assert [line["id"] for line in lines] == [f"{split}/{n}/{prompt}" for n in range(6) for prompt, split in asked]
    assert failed(run) == {f"{split}/{n}/{prompt}" for n in numbers for prompt, split in asked}
    shutil.copytree(whole, cut)
    path = cut / "greedy" / "answers.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    go(cut, work, vlm)
    assert files(cut) == files(whole)


def test_failures_of_the_samples_own_end_no_evaluation(tmp_path):
    work = workload(tmp_path / "in", 2 * FAILURES_IN_A_ROW)
    (tmp_path / "in" / "0003.png").write_bytes(b"broken")
    run = go(tmp_path / "out", work, FakeVLM(fails=lambda batch: LayoutError("strange")))
    assert len(failed(run)) == len(run.samples)


def spoiled(base):
    """A finished run whose both arms failed with pictures 2 and 5, and with a broken third."""
    work, out = workload(base / "in"), base / "out"
    (base / "in" / "0004.png").write_bytes(b"broken")
    run = go(out, work, FakeVLM(fails=odd(2, 5)), arms=("vcd",))
    assert len(failed(run)) == len(failed(run, "vcd")) == 12
    return work, out


def test_failed_samples_are_asked_again(tmp_path):
    work, out = spoiled(tmp_path)
    before = files(out)
    vlm = FakeVLM()
    vlm.load = lambda *_, **__: pytest.fail("loaded")
    go(out, work, vlm, arms=("vcd",))
    assert files(out) == before
    vlm = FakeVLM()
    run = go(out, work, vlm, arms=("vcd",), retry_failed=True)
    for arm in ("greedy", "vcd"):
        lines = list(read_lines(out / arm / "answers.jsonl"))
        ids = [line["id"] for line in lines]
        assert (len(ids), len(set(ids)), run.missing(arm)) == (24, 24, 0)
        assert {name.split("/")[1] for name in failed(run, arm)} == {"4"}
        kept = [line for line in before[Path(arm, "answers.jsonl")].splitlines() if b"failed" not in line]
        assert (out / arm / "answers.jsonl").read_bytes().splitlines()[:12] == kept
    assert colour(0) not in {shown for batch in vlm.batches[1:] for shown, _ in batch}
    workload(tmp_path / "in")  # the third picture is whole again
    assert not failed(go(out, work, FakeVLM(), retry_failed=True))
    assert failed(read_run(out), "vcd")  # its arm was not asked for


def test_what_fails_again_is_recorded_once(tmp_path):
    work, out = spoiled(tmp_path)
    before = files(out)
    run = go(out, work, FakeVLM(fails=odd(2, 5)), arms=("vcd",), retry_failed=True)
    for arm, file in files(out).items():
        assert sorted(file.splitlines()) == sorted(before[arm].splitlines())
    assert len(failed(run)) == 12


def test_asking_again_with_every_question_failing_stops_too(tmp_path):
    work, out = spoiled(tmp_path)
    with pytest.raises(SystematicError):
        go(out, work, FakeVLM(fails=renamed), arms=("vcd",), retry_failed=True)
    assert b"odd" not in b"".join(files(out).values())
    assert b"AttributeError" not in b"".join(files(out).values())
    run = go(out, work, FakeVLM(), arms=("vcd",))
    assert {arm: len(failed(run, arm)) for arm in run.answers} == {"greedy": 4, "vcd": 4}


def killed_at(step, base, out, pictures=6, retry_failed=True):
    """Asks, in a process that dies just before one of the calls that change the folder."""
    tasks.TASKS.homes["says"] = "tests.evals.fake:Says"
    work = workload(base / "in", pictures)
    (base / "in" / f"{pictures - 2:04d}.png").write_bytes(b"broken")
    die_at(step)
    go(out, work, FakeVLM(), retry_failed=retry_failed)


def test_killed_at_every_change_of_the_folder(tmp_path):
    work, whole = workload(tmp_path / "in", 2), tmp_path / "whole"
    (tmp_path / "in" / "0000.png").write_bytes(b"broken")
    go(whole, work, FakeVLM())
    step, code, complete = 0, -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        out = tmp_path / f"out{step}"
        code = ended(killed_at, step, tmp_path, out, 2, False)
        complete += files(out) == files(whole)
        go(out, work, FakeVLM())
        assert files(out) == files(whole)
        found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert found == {"card.json", "samples.jsonl", "greedy/answers.jsonl"}
        assert read_run(out).missing("greedy") == 0
        step += 1
    assert code == 0
    assert complete >= 3  # killed behind the last answer, before or while the card is written
    assert reproduce(read_run(tmp_path / f"out{step - 2}"), tmp_path / "again", loader=FakeVLM().load).exact


def test_killed_while_it_asks_again(tmp_path):
    work, whole = spoiled(tmp_path)
    kept = [line for line in files(whole)[Path("greedy/answers.jsonl")].splitlines() if b"failed" not in line]
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        out = tmp_path / f"out{step}"
        shutil.copytree(whole, out)
        code = ended(killed_at, step, tmp_path, out)
        found = files(out)[Path("greedy/answers.jsonl")].splitlines()
        assert [line for line in found if line in kept] == kept
        run = go(out, work, FakeVLM(), retry_failed=any(b"odd" in line for line in found))
        assert {name.split("/")[1] for name in failed(run)} == {"4"}
        lines = [line["id"] for line in read_lines(out / "greedy" / "answers.jsonl")]
        assert (len(lines), len(set(lines))) == (24, 24)
        assert sorted(os.listdir(out / "greedy")) == ["answers.jsonl"]
        step += 1
    assert code == 0
    assert step > 20


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(116, "Stale")])
def test_trouble_that_passes_is_no_fault_of_the_sample(tmp_path, error):
    work, out = workload(tmp_path / "in"), tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: error if any(shown == colour(2) for shown, _ in batch) else None)
    with pytest.raises(PassingError, match=r"8 samples are left open, the first a/2/shared: "):
        go(out, work, vlm, arms=("vcd",))
    run = read_run(out)
    assert not failed(run)
    assert [run.missing(arm) for arm in run.answers] == [4, 4]
    run = go(out, work, FakeVLM(), arms=("vcd",))
    assert [run.missing(arm) for arm in run.answers] == [0, 0]
    assert (run.asked_now, run.answered_now, run.in_vain) == (8, 8, False)


def test_pictures_that_cannot_be_opened_now_are_opened_later(tmp_path, monkeypatch):
    work, out = workload(tmp_path / "in"), tmp_path / "out"
    real = Image.open

    def opened(file, **options):
        if Path(file.name).name == "0003.png":
            raise OSError(24, "Too many open files")
        return real(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", opened)
        patch.setattr(images, "PAUSES", (0.0, 0.0))
        with pytest.raises(PassingError, match="4 samples are left open"):
            go(out, work, FakeVLM())
        patch.setattr(Image, "open", lambda *_, **__: opened(SimpleNamespace(name="0003.png")))
        with pytest.raises(PassingError, match=r"left open"):
            go(tmp_path / "other", work, FakeVLM())
    assert not failed(read_run(out))
    assert go(out, work, FakeVLM()).missing("greedy") == 0


def test_a_start_that_answers_nothing_says_so(tmp_path):
    work, out = workload(tmp_path / "in"), tmp_path / "out"
    broken = FakeVLM(fails=lambda batch: LayoutError("strange"))
    assert go(out, work, broken).in_vain
    assert go(out, work, broken).in_vain
    assert not go(out, work, FakeVLM(), retry_failed=True).in_vain
    assert go(out, work, broken, arms=("vcd",)).in_vain
    assert not go(out, work, FakeVLM(), arms=("vcd",), retry_failed=True).in_vain
