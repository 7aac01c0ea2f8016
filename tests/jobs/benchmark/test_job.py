"""Several decoders over one workload: order, arms, failures and rules."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.evals.fake import Says, workload
from tests.jobs.benchmark.asked import go
from tests.jobs.fake import FakeVLM, colour
from vlmfix.decoders import VCD
from vlmfix.errors import DataError, LayoutError, UsageError, VlmfixError
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.record import arm_folder, read_run
from vlmfix.evals.score import score
from vlmfix.evals.task import Sample, Workload
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings


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


class Sure(FakeVLM):
    """Leaves two tokens of each answer alone where its decoder may."""

    def generate(self, pictures, prompts, *, decoder, **options):
        answers = super().generate(pictures, prompts, **options)
        return [replace(answer, skipped=2 if decoder.waiting else None) for answer in answers]


def test_lines_card_report_and_comparison_say_what_a_contrast_left_alone(tmp_path):
    work, out, spec = workload(tmp_path / "in"), tmp_path / "out", "vcd:when=uncertain"
    go(out, work, Sure(broken={colour(3)}), arms=(spec,))
    run = go(out, work, Sure(), arms=(spec,), retry_failed=True)
    lines = list(read_lines(out / arm_folder(spec) / "answers.jsonl"))
    assert [line["skipped"] for line in lines] == [2] * len(work.samples)
    assert not any("skipped" in line for line in read_lines(out / "greedy" / "answers.jsonl"))
    noted = {"skipped": 2 * len(lines), "skip_rate": round(2 / 3, 4)}
    card = read_json(out / "card.json")
    assert card["arms"][spec].items() >= noted.items()
    assert "skip_rate" not in card["arms"]["greedy"]
    report = read_json(score(run).folder / "report.json")["arms"]
    assert report[spec].items() >= noted.items()
    assert "skip_rate" not in report["greedy"]
    (arm,) = compare([read_run(out)], draws=1000).arms
    assert arm.skip_rate == noted["skip_rate"]


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
