"""Several decoders over one workload: order, resume, refusals and failures."""

import json
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.evals.fake import Says, workload
from tests.jobs.fake import FakeVLM, colour
from tests.processes import server
from vlmfix.decoders import VCD, parse
from vlmfix.errors import DataError, LayoutError, UsageError, VlmfixError
from vlmfix.evals import tasks
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.record import read_run
from vlmfix.evals.score import score
from vlmfix.evals.task import Sample, Workload
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.jobs.benchmark.reproduce import reproduce
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings


@pytest.fixture(autouse=True)
def _known_task(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "says", Says)


def go(out, work, vlm, *, arms=(), batch_size=4, task=None, report=lambda done, total: None, **settings):
    return evaluate(
        out,
        task or Says(),
        work,
        Settings(**settings),
        {name: parse(name) for name in arms},
        batch_size=batch_size,
        report=report,
        loader=vlm.load,
    )


def files(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*.jsonl"))}


def test_every_arm_answers_every_sample(tmp_path):
    work, seen = workload(tmp_path / "in"), []
    run = go(tmp_path / "out", work, FakeVLM(), arms=("vcd",), report=lambda done, total: seen.append((done, total)))
    assert list(run.answers) == ["greedy", "vcd"]
    assert all(run.missing(arm) == 0 for arm in run.answers)
    assert run.samples == list(work.samples)
    assert seen == [(number, 48) for number in range(1, 49)]
    line = next(read_lines(tmp_path / "out" / "vcd" / "answers.jsonl"))
    assert line == {
        "id": "a/0/shared",
        "image": "0000.png",
        "sha256": line["sha256"],
        "answer": f"shared: {colour(0)}",
        "ids": [5, 6, 2],
        "finish": "eos",
    }
    assert len(line["sha256"]) == 64


def test_a_question_of_two_splits_is_asked_once_and_pictures_stay_together(tmp_path):
    vlm = FakeVLM()
    run = go(tmp_path / "out", workload(tmp_path / "in"), vlm, batch_size=3)
    assert [len(batch) for batch in vlm.batches] == [3] * 6
    for number, batch in enumerate(vlm.batches):
        assert {shown for shown, _ in batch} == {colour(number)}
        assert [prompt for _, prompt in batch] == ["shared", "only a", "only b"]
    answers = run.answers["greedy"]
    assert answers["a/2/shared"].answer == answers["b/2/shared"].answer


def test_rows_about_one_picture_hold_one_object(tmp_path):
    class Looks(FakeVLM):
        def generate(self, pictures, prompts, **options):
            self.distinct = len({id(picture) for picture in pictures})
            return super().generate(pictures, prompts, **options)

    vlm = Looks()
    go(tmp_path / "out", workload(tmp_path / "in", 1), vlm)
    assert vlm.distinct == 1


def test_answers_come_from_kernels_that_repeat_themselves(tmp_path):
    class Watch(FakeVLM):
        def generate(self, pictures, prompts, **options):
            self.cudnn = torch.backends.cuda.cudnn_sdp_enabled()
            return super().generate(pictures, prompts, **options)

    vlm, before = Watch(), torch.backends.cuda.cudnn_sdp_enabled()
    go(tmp_path / "out", workload(tmp_path / "in", 1), vlm)
    assert vlm.cudnn is False
    assert torch.backends.cuda.cudnn_sdp_enabled() is before


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


def test_what_fails_is_recorded_and_never_scored(tmp_path):
    work = workload(tmp_path / "in")
    (tmp_path / "in" / "0001.png").write_bytes(b"no picture")
    vlm = FakeVLM(
        fails=lambda batch: RuntimeError("boom") if (colour(2), "only a") in batch else None, broken={colour(3)}
    )
    run = score(go(tmp_path / "out", work, vlm))
    failed = {name: found.failed for name, found in run.answers["greedy"].items() if found.failed}
    assert set(failed) == {
        *(f"{split}/1/{question}" for split in "ab" for question in ("shared", f"only {split}")),
        "a/2/only a",
        *(f"{split}/3/{question}" for split in "ab" for question in ("shared", f"only {split}")),
    }
    assert failed["a/1/shared"].startswith("not a picture")
    assert failed["a/2/only a"] == "RuntimeError: boom"
    assert failed["b/3/shared"] == "the model's output was not a number"
    assert len(run.judged("greedy")) == 24 - 9
    report = read_json(tmp_path / "out" / "report.json")["arms"]["greedy"]
    assert (report["answers"], report["failed"], report["missing"]) == (15, 9, 0)
    assert read_json(tmp_path / "out" / "results.json")["greedy"]["a/accuracy"] == 1.0


def test_scoring_again_with_another_rule(tmp_path):
    run = go(tmp_path / "out", workload(tmp_path / "in"), FakeVLM())
    assert score(run).task == Says()
    assert read_json(tmp_path / "out" / "results.json")["greedy"]["a/accuracy"] == 1.0
    score(read_run(tmp_path / "out"), upper=True)
    assert read_json(tmp_path / "out" / "results.json")["greedy"]["a/accuracy"] == 0.0
    assert read_run(tmp_path / "out").task == Says(upper=True)


def test_rules_that_cannot_score_do_not_become_the_runs(tmp_path, monkeypatch):
    run = score(go(tmp_path / "out", workload(tmp_path / "in"), FakeVLM()))
    before = {path.name: path.read_bytes() for path in run.folder.glob("*.json*")}

    def judge(self, sample, answer):
        raise DataError("no such rule")

    monkeypatch.setattr(Says, "judge", judge)
    with pytest.raises(DataError, match="no such rule"):
        score(run, samples=run.samples[::-1], upper=True)
    assert {path.name: path.read_bytes() for path in run.folder.glob("*.json*")} == before


def test_when_everything_failed_the_comparison_says_so(tmp_path):
    run = go(tmp_path / "out", workload(tmp_path / "in"), FakeVLM(fails=lambda batch: LayoutError("boom")))
    with pytest.raises(DataError, match="24 of 24 failed in greedy"):
        compare([run])


def test_nothing_to_ask(tmp_path):
    with pytest.raises(DataError, match="nothing to ask"):
        go(tmp_path / "out", Workload(samples=[], images=None, about={}), FakeVLM())


def test_ids_that_repeat(tmp_path):
    work = workload(tmp_path / "in")
    with pytest.raises(DataError, match="the id 'a/0/shared'"):
        go(tmp_path / "out", replace(work, samples=[*work.samples, work.samples[0]]), FakeVLM())


def test_missing_pictures_are_listed_before_the_model_loads(tmp_path):
    work = workload(tmp_path / "in", 9)
    for number in range(7):
        (tmp_path / "in" / f"{number:04d}.png").unlink()
    with pytest.raises(DataError, match=r"7 of 9 pictures .* 0000.png, .*, 0004.png and 2 more"):
        go(tmp_path / "out", work, FakeVLM(fails=lambda batch: AssertionError("asked")))
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_a_picture(tmp_path):
    class Blind(FakeVLM):
        def generate(self, pictures, prompts, **options):
            self.shown = pictures
            return super().generate(_grey(len(pictures)), prompts, **options)

    def _grey(count):
        from PIL import Image

        return [Image.new("RGB", (2, 2))] * count

    vlm = Blind()
    sample = Sample(id="1", image=None, prompt="what", target={"word": "what"}, group="a")
    run = go(tmp_path / "out", Workload(samples=[sample], images=None, about={}), vlm)
    assert vlm.shown == [[]]
    assert run.answers["greedy"]["1"].answer.startswith("what")


class Idle(VCD):
    def check(self, vlm):
        return "it has nothing to contrast"


def test_a_decoder_that_cannot_act_leaves_the_folder_free(tmp_path):
    vlm, work = FakeVLM(), workload(tmp_path / "in")
    with pytest.raises(UsageError, match="idle cannot act on tiny: it has nothing to contrast"):
        evaluate(tmp_path / "out", Says(), work, Settings(), {"idle": Idle()}, loader=vlm.load)
    assert vlm.batches == []
    assert list(go(tmp_path / "out", work, vlm, arms=("vcd",)).answers) == ["greedy", "vcd"]


def test_a_model_that_cannot_be_loaded_leaves_the_folder_free(tmp_path):
    class Unknown(FakeVLM):
        def load(self, model, **_):
            raise DataError(f"cannot load {model}")

    work = workload(tmp_path / "in")
    with pytest.raises(DataError, match="cannot load tiiny"):
        go(tmp_path / "out", work, Unknown(), model="tiiny")
    assert go(tmp_path / "out", work, FakeVLM()).card["model"] == "tiny"


def test_the_plain_arm_is_plain(tmp_path):
    vlm = FakeVLM()
    with pytest.raises(UsageError, match="an arm called greedy is vcd:"):
        evaluate(tmp_path / "out", Says(), workload(tmp_path / "in"), Settings(), {"greedy": VCD()}, loader=vlm.load)
    assert vlm.batches == []


def test_arms_that_choose_tokens_otherwise_are_compared_and_said_to(tmp_path):
    run = go(
        tmp_path / "out", workload(tmp_path / "in"), FakeVLM(), arms=("vcd", "beam:num_beams=3", "vcd+sample"), seed=4
    )
    notes = [note for note in compare([run]).notes if "chooses" in note]
    assert notes == [
        "beam:num_beams=3 chooses tokens otherwise than greedy, by intention: 3 beams.",
        "vcd+sample chooses tokens otherwise than greedy, by intention: sampling at temperature 1 (seed 4).",
    ]


@pytest.mark.parametrize(
    ("arm", "settings", "message"),
    [
        ("beam:num_beams=3", {"num_beams": 2}, "num_beams=2 is asked for with a decoder that chooses by 3 beams"),
        ("sample", {"temperature": 0.5}, r"temperature=0\.5 .* sampling at temperature 1"),
        ("sgrs", {"num_beams": 2}, "does not work with beam search"),
    ],
)
def test_arms_that_contradict_the_settings_are_refused_before_the_model_loads(tmp_path, arm, settings, message):
    vlm = FakeVLM()
    vlm.load = lambda *args, **kwargs: pytest.fail("a model was loaded")
    with pytest.raises(VlmfixError, match=message):
        go(tmp_path / "out", workload(tmp_path / "in"), vlm, arms=("vcd", arm), **settings)
    assert not (tmp_path / "out").exists()


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


def slowly(base):
    """Runs in a process of its own, to be killed."""
    tasks.TASKS["says"] = Says
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
    "sessions": [None, {}, [None], [{}], [{"versions": 1}], [{"versions": {"torch": 1}}]],
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
