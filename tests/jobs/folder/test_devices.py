"""Several processes over one folder: the files of one, whatever ends."""

import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.jobs.fake import FakeVLM, colour, draw
from tests.processes import server
from vlmfix import crew
from vlmfix.crew import Crew, devices_of
from vlmfix.errors import DataError, PassingError, SystematicError, UsageError
from vlmfix.jobs.folder import Questions, run
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings
from vlmfix.supply import Question

TWO = ("cpu", "cpu")


class Named(FakeVLM):
    """Says which process it is in."""

    def generate(self, pictures, prompts, **options):
        answers = super().generate(pictures, prompts, **options)
        return [replace(answer, text=str(os.getpid())) for answer in answers]


def quick(model, **how):
    return FakeVLM(seconds=0.002)


def named(model, **how):
    return Named(seconds=0.01)


def stuck(model, **how):
    def fails(batch):
        if any(shown == colour(20) for shown, _ in batch):
            time.sleep(60)

    return Named(seconds=0.01, fails=fails)


def odd(model, **how):
    def fails(batch):
        found = [shown for shown, _ in batch if shown in (colour(3), colour(4), colour(11))]
        return ValueError(f"cannot resize {found[0]}") if found else None

    return FakeVLM(fails=fails)


def broken(model, **how):
    return FakeVLM(fails=lambda batch: AttributeError("no attribute 'patches'"))


def refusing(model, **how):
    return FakeVLM(fails=lambda batch: UsageError("cannot act", "leave it out"))


def mortal(model, **how):
    def fails(batch):
        if any(shown == colour(13) for shown, _ in batch):
            os.kill(os.getpid(), signal.SIGKILL)

    return FakeVLM(fails=fails)


def small(model, **how):
    return FakeVLM(fails=lambda batch: MemoryError("no more") if len(batch) > 2 else None)


def unloadable(model, **how):
    raise DataError(f"cannot load {model!r}", "give another")


def go(pictures, out, loader, *, devices=TWO, batch_size=3, **more):
    how = {"settings": Settings(), "batch_size": batch_size, "devices": devices, "loader": loader}
    return run(pictures, out, questions=Questions(everywhere=("A?", "B?")), **how, **more)


def kept(out):
    """Answers in their order, and failures: a file that is no picture is noted when it is opened, which is ahead."""
    failed = sorted(read_lines(out / "failed.jsonl"), key=lambda line: (line["image"], line.get("prompt", "")))
    return {"answers.jsonl": list(read_lines(out / "answers.jsonl")), "failed.jsonl": failed}


def test_the_files_are_those_of_one_process(tmp_path):
    pictures = draw(tmp_path / "in", 20)
    (pictures / "0007x.png").write_bytes(b"")
    for loader in (quick, odd):
        one, two = tmp_path / f"one {loader.__name__}", tmp_path / f"two {loader.__name__}"
        ends = go(pictures, one, loader, devices=()), go(pictures, two, loader)
        assert kept(one) == kept(two)
        assert ends[0].totals == ends[1].totals
        first, second = (read_json(out / "run.json") for out in (one, two))
        assert first["settings"] == second["settings"]
        assert (second["finished"], second["sessions"][0]["device"]) == (True, "cpu, cpu")
        assert second["peak_memory"] > 0


def test_both_processes_answer_and_none_is_left(tmp_path):
    go(draw(tmp_path / "in", 20), tmp_path / "out", named)
    said = {line["answer"] for line in read_lines(tmp_path / "out" / "answers.jsonl")}
    assert len(said) == 2
    assert str(os.getpid()) not in said
    assert not any(alive(int(process)) for process in said)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_error_of_every_question_ends_the_run_and_notes_nothing(tmp_path):
    pictures, out = draw(tmp_path / "in", 12), tmp_path / "out"
    with pytest.raises(SystematicError, match="8 questions in a row failed with greedy") as stopped:
        go(pictures, out, broken)
    assert "raise problem" in stopped.value.__notes__[0]
    assert kept(out) == {"answers.jsonl": [], "failed.jsonl": []}
    with pytest.raises(UsageError, match="cannot act") as stopped:
        go(pictures, out, refusing)
    assert stopped.value.hint == "leave it out"
    with pytest.raises(DataError, match="cannot load 'tiny'"):
        go(pictures, out, unloadable)
    go(pictures, out, quick)
    assert len(kept(out)["answers.jsonl"]) == 24


def test_a_process_that_dies_ends_the_run_and_nothing_is_lost(tmp_path):
    pictures, out = draw(tmp_path / "in", 20), tmp_path / "out"
    with pytest.raises(PassingError, match="the process that answered on cpu was killed by signal 9"):
        go(pictures, out, mortal)
    assert read_json(out / "run.json")["finished"] is False
    assert multiprocessing.active_children() == []
    before = kept(out)["answers.jsonl"]
    assert before
    go(pictures, out, quick)
    after = kept(out)["answers.jsonl"]
    assert after[: len(before)] == before
    assert [(line["image"], line["prompt"]) for line in after] == [
        (f"{n:04d}.png", prompt) for n in range(20) for prompt in ("A?", "B?")
    ]


def test_memory_that_runs_out_in_one_process_makes_batches_smaller(tmp_path):
    seen = []
    end = go(
        draw(tmp_path / "in", 12), tmp_path / "out", small, batch_size=4, report=lambda now: seen.append(now.batch_size)
    )
    assert (end.totals.answers, seen[0], seen[-1]) == (24, 4, 2)


def test_an_automatic_batch_is_that_of_the_fullest_device(tmp_path):
    end = go(draw(tmp_path / "in", 3), tmp_path / "out", quick, batch_size=None)
    assert (end.batch_size, end.totals.answers) == (8, 6)


def test_an_interrupt_ends_the_processes_at_once(tmp_path):
    def report(progress):
        if progress.answered:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(draw(tmp_path / "in", 20), tmp_path / "out", named, report=report)
    assert multiprocessing.active_children() == []
    assert not any(alive(int(line["answer"])) for line in kept(tmp_path / "out")["answers.jsonl"])


def work(pictures, out):
    go(pictures, out, stuck)


def test_processes_end_with_the_job_that_is_killed(tmp_path):
    """Also one that is in the middle of a batch."""
    pictures, out = draw(tmp_path / "in", 24), tmp_path / "out"
    process = server().Process(target=work, args=(pictures, out))
    process.start()
    until, said = time.monotonic() + 60, set()
    while len(said) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        if (out / "answers.jsonl").exists():
            said = {line["answer"] for line in read_lines(out / "answers.jsonl")}
    process.kill()
    process.join()
    assert len(said) == 2
    until = time.monotonic() + 10
    while any(alive(int(one)) for one in said) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(int(one)) for one in said)


def test_a_process_says_why_it_ended_also_to_who_sends_it_more():
    batch = [Question(Image.new("RGB", (4, 4)), "What?")]
    with Crew(["cpu"], Settings(), 1, [], refusing) as hands:
        (hand,) = hands._hands
        hand.send(batch)
        hand.process.join(10)
        with pytest.raises(UsageError, match="cannot act"):
            hand.send(batch)


@pytest.mark.parametrize(
    ("names", "devices"),
    [("all", ["cuda:0", "cuda:1"]), ("1", ["cuda:1"]), ("0,1", ["cuda:0", "cuda:1"]), ("cpu,cpu", ["cpu", "cpu"])],
)
def test_devices_by_name(monkeypatch, names, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of(names) == devices


@pytest.mark.parametrize("names", ["", "2", "0,", "cuda:x", "gpu", "-1", "0,0", "all,0", "mps", "²"])
def test_devices_that_are_not_there(monkeypatch, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--devices"):
        devices_of(names)


def test_all_of_no_devices(monkeypatch):
    monkeypatch.setattr(crew.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="torch sees no GPU"):
        devices_of("all")


def test_what_several_devices_do_not_go_with(vlmfix, tmp_path):
    pictures, out = draw(tmp_path / "in", 1), tmp_path / "out"
    code, _, err = vlmfix("run", pictures, "--out", out, "--devices", "cpu,cpu", "--device", "cpu")
    assert (code, "--device and --devices are both given" in err) == (2, True)
    more = ("--decoder", "vicrop", "--save-maps", tmp_path / "maps")
    code, _, err = vlmfix("run", pictures, "--out", out, "--devices", "cpu,cpu", *more)
    assert (code, "--save-maps does not go with --devices" in err) == (2, True)
    assert not out.exists()


def test_answers_of_a_model_in_two_processes(vlmfix, tmp_path):
    pictures = draw(tmp_path / "in", 5)
    how = ("--max-new-tokens", 3, "--batch-size", 2)
    assert vlmfix("run", pictures, "--out", tmp_path / "one", *how)[0] == 0
    assert vlmfix("run", pictures, "--out", tmp_path / "two", *how, "--devices", "cpu,cpu")[0] == 0
    one, two = (
        [(line["image"], line["answer"], line["tokens"]) for line in read_lines(tmp_path / out / "answers.jsonl")]
        for out in ("one", "two")
    )
    assert one == two
    assert len(two) == 5


@pytest.mark.parametrize("kind", [UsageError, PassingError, SystematicError, DataError])
def test_errors_keep_their_hint_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("wrong\nhere", "do this")))
    assert (type(error), error.message, error.hint, str(error)) == (
        kind,
        "wrong\\nhere",
        "do this",
        "wrong\\nhere (do this)",
    )


@pytest.mark.gpu
def test_answers_on_every_gpu_are_those_of_one(vlmfix, tmp_path):
    pictures = draw(tmp_path / "in", 40)
    how = ("--max-new-tokens", 12, "--batch-size", 4, "--dtype", "float32")
    assert vlmfix("run", pictures, "--out", tmp_path / "one", *how, "--device", "cuda")[0] == 0
    assert vlmfix("run", pictures, "--out", tmp_path / "all", *how, "--devices", "all")[0] == 0
    one, every = ([line["answer"] for line in kept(tmp_path / out)["answers.jsonl"]] for out in ("one", "all"))
    assert one == every
    card = read_json(tmp_path / "all" / "run.json")
    assert card["sessions"][0]["device"].count("cuda:") == torch.cuda.device_count()
    assert card["peak_memory"] > 0
