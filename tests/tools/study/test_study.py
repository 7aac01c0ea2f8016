"""The study of effects: shared work, parts of runs, controls, searches; and all of it once, small."""

import collections
import json
import random
import time
from dataclasses import replace
from typing import ClassVar
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evals.fake import Says, workload
from tests.jobs.fake import FakeVLM, draw
from tests.tools.study.jobs import double, gpu_of_process
from tools.study import plan, runs, speed, study, tuning
from tools.study.__main__ import command
from tools.study.clock import Clock, Job, OutOfTimeError, crew, perform
from tools.study.results import compared
from tools.study.runs import Exam, answer_arm, answer_plain, copy_plain, take_in
from tools.study.small import Elsewhere, questions
from tools.study.tuning import Found, Hunt, hunt
from vlmfix.decoders import CARVE, DECODERS, Greedy, ViCrop, parse
from vlmfix.decoders.picture.refined import PictureMap, PictureMemo
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.evals import tasks
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.record import CARD, PLAIN
from vlmfix.evals.tuning.search import Measured
from vlmfix.generation import Answer
from vlmfix.language.recipe import read_recipe
from vlmfix.records import read_json, replace_json
from vlmfix.settings import UNSEARCHED, Settings
from vlmfix.world.scenes import scene

ENDLESS, OVER = Clock(), Clock(end=0.0)


JOBS = {f"job {number}": Job(double, (number,)) for number in range(2, 6)}


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_fail_stop_and_end_each_for_itself(processes, capfd):
    with crew(processes) as pool:
        found = dict(perform(JOBS, ENDLESS, pool))
    assert set(found) == set(JOBS)
    assert (found["job 2"].value, found["job 2"].problem) == (4, "")
    assert "three" in found["job 3"].problem
    assert found["job 4"].problem == "ZeroDivisionError: four"
    assert found["job 5"].stopped
    assert "ZeroDivisionError" in capfd.readouterr().err, "what nobody expected is shown"


def test_processes_share_out_the_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with crew(2) as pool:
        found = dict(perform({name: Job(gpu_of_process, ()) for name in "ab"}, ENDLESS, pool))
    assert {outcome.value for outcome in found.values()} == {"5", "7"}


def test_nothing_begins_when_the_time_is_over():
    assert all(outcome.stopped for _, outcome in perform(JOBS, OVER, None))
    with pytest.raises(OutOfTimeError):
        OVER.report(1, 2)
    Clock(end=time.time() + 60).check()


@pytest.fixture
def exam(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS.homes, "says", "tests.evals.fake:Says")
    vlm = FakeVLM()
    monkeypatch.setattr(runs, "loaded", vlm.load)
    monkeypatch.setattr(runs, "weights_digest", lambda model, commit: "sha256:1")
    monkeypatch.setattr("vlmfix.jobs.ledger.weights_digest", lambda model, commit: "sha256:1")
    made = Exam(
        folder=tmp_path / "run",
        task=Says(),
        workload=workload(tmp_path / "in"),
        settings=Settings(),
        batch_size=4,
    )
    return made, vlm


def test_arms_answered_apart_come_into_one_run(exam):
    made, vlm = exam
    answer_plain(made, ENDLESS)
    assert made.begun()
    asked = len(vlm.batches)
    for name in ("vcd", "inter"):
        answer_arm(made, name, parse(name), ENDLESS)
        assert not made.has(name, parse(name))
        take_in(made, name)
        assert made.has(name, parse(name))
        assert not made.part(name).folder.exists()
    assert len(vlm.batches) == 3 * asked, "plain decoding is answered once"
    run = made.run()
    assert list(run.answers) == ["greedy", "vcd", "inter"]
    assert all(run.missing(arm) == 0 for arm in run.answers)
    assert [list(session["arms"]) for session in run.card["sessions"]] == [["greedy"], ["vcd"], ["inter"]]
    assert [arm.name for arm in compare([run]).arms] == ["vcd", "inter"]
    answer_arm(made, "vcd", parse("vcd"), ENDLESS)
    take_in(made, "vcd")
    assert len(vlm.batches) == 3 * asked, "what is there is not asked again"
    with pytest.raises(UsageError, match="vcd was 'vcd:"):
        answer_arm(made, "vcd", parse("vcd:contrast=0.5"), ENDLESS)


def test_arms_of_the_run_that_are_not_asked_for_are_left_out(exam):
    made, _ = exam
    answer_plain(made, ENDLESS)
    for name in ("sample", "vcd"):
        answer_arm(made, name, parse(name), ENDLESS)
        take_in(made, name)
    found = compared(made, ["vcd", "missing"])
    assert list(found) == [PLAIN, "vcd"]
    assert found["vcd"]["a/accuracy"]["difference"] == 0
    assert list(compared(made, ["sample"])) == [PLAIN, "sample"]


def test_an_arm_that_was_stopped_goes_on(exam):
    made, vlm = exam
    answer_plain(made, ENDLESS)
    done = len(vlm.batches)
    vlm.seconds = 0.01
    with pytest.raises(OutOfTimeError):
        answer_arm(made, "vcd", parse("vcd"), Clock(end=time.time() + 0.1))
    before = len(vlm.batches) - done
    assert 0 < before < done
    answer_arm(made, "vcd", parse("vcd"), ENDLESS)
    assert len(vlm.batches) <= 2 * done + 1
    take_in(made, "vcd")
    assert made.run().missing("vcd") == 0


def test_a_part_whose_copy_was_cut_off_is_copied_again(exam):
    made, _ = exam
    answer_plain(made, ENDLESS)
    other = made.at(made.folder.with_name("other"))
    (other.folder / PLAIN).mkdir(parents=True)
    (other.folder / PLAIN / "answers.jsonl").write_text("{")
    copy_plain(made, other)
    assert other.run().answers == made.run().answers


def test_other_weights_of_the_same_name_are_refused(exam, monkeypatch):
    made, _ = exam
    answer_plain(made, ENDLESS)
    monkeypatch.setattr(runs, "weights_digest", lambda model, commit: "sha256:2")
    with pytest.raises(UsageError, match=r"weights was 'sha256:1', now 'sha256:2'"):
        answer_plain(made, ENDLESS)


def test_questions_about_small_things(tmp_path):
    asked = questions(12, 5, tmp_path)
    assert asked.samples == questions(12, 5, tmp_path).samples
    assert {sample.target["label"] for sample in asked.samples} == {"yes", "no"}
    for sample in asked.samples:
        view = scene(5, int(sample.image.removesuffix(".png")))
        name = sample.id.partition("/")[2]
        boxes = [thing.box for thing in view.objects if thing.category == name]
        assert f" {name} in the image?" in sample.prompt
        assert (sample.target["label"] == "yes") == bool(boxes)
        assert all(max(box[2] - box[0], box[3] - box[1]) < 48 for box in boxes)
        assert len(boxes) <= 1


class Pointing(CARVE):
    """CARVE with a map that is given."""

    def refine(self, vlm, pictures, prompts, memo):
        values = np.zeros((8, 8))
        values[1:3, 5:7] = 1.0
        maps = PictureMap(values)
        return [self._refined(row, [maps] * len(row)) for row in pictures]


def test_the_control_shows_as_much_of_another_place():
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    decoder = Pointing(preset="official-code", kept_share=0.1, regions=1)
    pictures, prompts = [[noise], [noise], []], ["a", "b", "c"]
    found = decoder.refine(None, pictures, prompts, None)
    control = Elsewhere(decoder=decoder)
    moved = control.refine(None, pictures, prompts, None)
    assert moved[2].looks == ()
    assert moved[0].looks[0].box != moved[1].looks[0].box, "each question has its own draw"
    for one, other in zip(found[:2], moved[:2], strict=True):
        (look,), (away,) = one.looks, other.looks
        assert other.pictures == (noise, away.picture)
        assert away.picture.size == look.picture.size
        x0, y0, x1, y1 = away.box
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        assert (x1 - x0, y1 - y0) == pytest.approx((look.box[2] - look.box[0], look.box[3] - look.box[1]))
        black = [(np.asarray(shown.picture) == 0).all(axis=2).mean() for shown in (look, away)]
        assert black[0] == pytest.approx(black[1], abs=0.05), "the same shape of what is hidden"
        assert not np.array_equal(np.asarray(look.picture), np.asarray(away.picture))
    again = control.refine(None, pictures, prompts, None)
    assert [look.box for row in again for look in row.looks] == [look.box for row in moved for look in row.looks]
    assert "elsewhere(carve:" in control.spec()


def test_the_control_moves_windows_of_vicrop(tiny_vlm):
    picture = Image.effect_noise((512, 384), 80).convert("RGB")
    decoder = ViCrop()
    (found,) = decoder.refine(tiny_vlm, [[picture]], ["Is there a cup?"], tiny_vlm.memo)
    (moved,) = Elsewhere(decoder=decoder).refine(tiny_vlm, [[picture]], ["Is there a cup?"], tiny_vlm.memo)
    assert moved.pictures[1].size == found.pictures[1].size
    x0, y0, x1, y1 = moved.looks[0].box
    own = picture.crop((round(x0 * 512), round(y0 * 384), round(x1 * 512), round(y1 * 384)))
    assert np.array_equal(np.asarray(own), np.asarray(moved.pictures[1])), "it shows what its box says"
    with pytest.raises(IncompatibleDecodersError, match="shows no window"):
        Elsewhere(decoder=Greedy())._elsewhere(tiny_vlm, picture, found.looks[0], random.Random(0))


@pytest.fixture(scope="module")
def tiny_vlm():
    return runs.loaded("tiny", revision=None, device="cpu", dtype="auto")


def test_every_decoder_and_every_chain_has_a_row():
    rows = plan.arms()
    assert [arm.spec for arm in rows[: len(DECODERS) - 1]] == [name for name in DECODERS if name != PLAIN]
    assert [arm.spec for arm in rows[len(DECODERS) - 1 :]] == list(plan.CHAINS)
    for arm in rows:
        assert parse(plan.brief(arm.decoder)) == arm.decoder
        for spec in plan.starts(arm):
            parse(spec)
    assert plan.starts(plan.Arm("act", "act")) == ["act:heads=all", "act:preset=official-code,heads=all"]
    assert plan.starts(plan.Arm("vcd:contrast=1", "vcd:contrast=1")) == ["vcd:contrast=1"]
    assert [arm.name for arm in plan.arms(("vcd", "greedy"))] == ["vcd"]
    refining = plan.small_arms(plan.arms())
    assert {arm.spec for arm in refining} >= {"carve", "carve:preset=official-code", "vicrop", "vicrop:preset=paper"}
    assert len(plan.with_controls(refining)) == 2 * len(refining)


@pytest.mark.parametrize(
    "spec", ["vcd", "vcd:contrast=0.3", "vcd:preset=official-code,noise_step=9+spin:suppression=0.5", "carve"]
)
def test_brief(spec):
    assert plan.brief(parse(spec)) == spec


@pytest.fixture
def hunted(tmp_path, monkeypatch):
    """A search whose answers are a formula, and what was tried."""
    seen = []

    def captions(wanted, clock):
        def measure(decoder):
            clock.check()
            seen.append(decoder.contrast)
            if decoder.contrast > 1.5:
                raise IncompatibleDecodersError("too much", "take less")
            lost = max(0.0, decoder.contrast - 0.4)
            value = 0.2 - 0.3 * min(decoder.contrast, 0.5)
            return Measured(value, {"recall": lost - 0.01}, {"value": value, "recall": 0.9 - lost})

        return measure, {"value": 0.2, "recall": 0.9, "f1": 0.9}

    monkeypatch.setattr(tuning, "_captions", captions)
    monkeypatch.setattr(tuning, "_f1", lambda wanted, decoder, clock: 0.9)
    folder = tmp_path / "plain"
    folder.mkdir()
    replace_json(folder / CARD, {"weights": "sha256:1", "model": "tiny", "dtype": "float32"})
    exam = Exam(folder=folder, task=Says(), workload=workload(tmp_path / "in"), settings=Settings(), batch_size=2)
    specs = ["vcd:plausibility=0.1,noise_step=500", "vcd:plausibility=0.1,noise_step=900"]
    return Hunt(folder=tmp_path / "search", specs=specs, exams={"chair": exam, "pope": exam}, trials=25), seen


def test_a_search_takes_the_best_within_the_limits(hunted):
    wanted, seen = hunted
    found = hunt(wanted, ENDLESS)
    assert len(seen) == found.trials == 25
    best = parse(found.spec).contrast
    assert best == max(contrast for contrast in seen if contrast <= 0.41)
    assert 0 < found.feasible < 25
    assert found.furthest["value"] <= found.chosen["value"] < found.plain["value"]
    assert read_recipe(wanted.folder / "recipe.toml")["decoder"] == found.spec
    assert Found(**read_json(wanted.folder / tuning.FOUND)) == found
    assert hunt(wanted, ENDLESS) == found
    assert len(seen) == 25, "a finished search is not done again"
    more = hunt(replace(wanted, trials=27), ENDLESS)
    assert (more.trials, len(seen)) == (27, 27)
    with pytest.raises(UsageError, match="seed was 0, now 1"):
        hunt(replace(wanted, seed=1), ENDLESS)
    exams = {name: replace(exam, batch_size=3) for name, exam in wanted.exams.items()}
    with pytest.raises(UsageError, match="batch_size was 2, now 3"):
        hunt(replace(wanted, exams=exams), ENDLESS)
    fewer = hunt(replace(wanted, trials=2), ENDLESS)
    assert (fewer.trials, len(seen)) == (2, 27)
    assert fewer.furthest["value"] >= found.furthest["value"]


@pytest.mark.parametrize("kept", [True, False])
def test_pope_is_asked_of_the_best_until_one_keeps_its_f1(hunted, monkeypatch, kept):
    wanted, seen = hunted
    asked = []

    def f1(wanted, decoder, clock):
        asked.append(decoder.contrast)
        return 0.891 if kept and len(asked) == 3 else 0.889

    monkeypatch.setattr(tuning, "_f1", f1)
    found = hunt(wanted, ENDLESS)
    again = len(asked)
    assert hunt(wanted, ENDLESS) == found
    assert len(asked) == again, "a finished search asks nothing"
    feasible = sorted((contrast for contrast in seen if contrast <= 0.41), reverse=True)
    assert asked == (feasible[:3] if kept else feasible)
    assert found.turned_down == (2 if kept else len(feasible))
    assert found.feasible == len(feasible)
    if kept:
        assert parse(found.spec).contrast == feasible[2]
        assert found.chosen["f1"] == 0.891
    else:
        assert (found.spec, found.chosen) == ("", {})


def test_a_search_that_was_stopped_goes_on(hunted):
    wanted, seen = hunted
    with pytest.raises(OutOfTimeError):
        hunt(wanted, OVER)
    assert seen == []
    assert not (wanted.folder / tuning.FOUND).exists()
    assert hunt(wanted, ENDLESS).trials == 25


def test_plain_decoding_stays_where_nothing_keeps_within_the_limits(hunted):
    wanted, _ = hunted
    found = hunt(replace(wanted, specs=["vcd:plausibility=0.1,noise_step=500"], trials=1), ENDLESS)
    assert (found.spec, found.feasible, found.trials) == ("", 0, 1)
    assert "contrast=1.0" in found.furthest["spec"]
    assert not (wanted.folder / "recipe.toml").exists()


class Timed:
    """Answers after a while that its decoder decides."""

    device = torch.device("cpu")
    seconds: ClassVar = {"greedy": 0.01, "vcd": 0.03}

    def __init__(self):
        self.memo = PictureMemo()
        self.calls = []

    def generate(self, pictures, prompt, *, decoder, max_new_tokens):
        self.calls.append(decoder.name)
        time.sleep(self.seconds[decoder.name])
        return [Answer("", 5, "eos", 0.0, ())] * len(pictures)


def test_times_are_per_token_and_against_plain(tmp_path, monkeypatch):
    vlm = Timed()
    monkeypatch.setattr(speed, "loaded", lambda *model, **how: vlm)
    pictures = sorted(draw(tmp_path / "in", 2).iterdir())
    for _ in range(2):
        speed.time_arm(tmp_path / "speed", Settings(), pictures, "mine", parse("vcd"))
    found = speed.times(tmp_path / "speed", ["other", "mine"])["mine"]
    assert vlm.calls == ["greedy"] * 4 + ["vcd"] * 4, "what was timed before is not timed again"
    assert (found["device"], found["rows"]) == ("cpu", 2)
    assert 3 <= found["ms"] < 30
    assert found["times"] > 1.5
    replace_json(tmp_path / "speed" / "mine.json", found | {"device": "another"})
    speed.time_arm(tmp_path / "speed", Settings(), pictures, "mine", parse("vcd"))
    assert vlm.calls == (["greedy"] * 4 + ["vcd"] * 4) * 2, "another device is another time"


def test_ways_of_decoders_are_measured_but_not_searched():
    ways = {arm.spec for arm in plan.variants()}
    assert {"act:heads=all", "vcd:agreement=0.05", "vcd:when=uncertain", "inter:when=uncertain"} <= ways
    assert not ways & {arm.spec for arm in plan.arms()}
    assert plan.variants(["vcd"]) == []


def test_some_chains_are_chosen_from_a_list(hunted):
    (arm,) = plan.listed()
    assert arm.name == "beam+vcd+spin"
    assert plan.starts(arm) == list(plan.LISTED[arm.name])
    assert {plan.Arm("", spec).decoder.strategy.num_beams for spec in plan.starts(arm)} == {5}
    assert plan.listed(["vcd"]) == []
    wanted, seen = hunted
    specs = [f"vcd:contrast={contrast}" for contrast in (0.2, 0.35, 0.6, 1.7)]
    own = replace(wanted, specs=specs, listed=True)
    found = hunt(own, ENDLESS)
    assert hunt(own, ENDLESS) == found
    assert seen == [0.2, 0.35, 0.6, 1.7], "each once, and not again"
    assert (found.trials, found.feasible, parse(found.spec).contrast) == (4, 2, 0.35)


def test_the_longest_work_begins_first(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(study, "_all", lambda wanted, jobs, pool: begun.append(list(jobs)) or True)
    monkeypatch.setattr(study, "survey", lambda wanted: {model: dict.fromkeys(only, "") for model in wanted.models})
    monkeypatch.setattr(study.Study, "exams", lambda self, model, **which: dict.fromkeys(["chair", "pope"]))
    only = ("spin", "beam", "vcd", "carve")
    wanted = study.Study(
        out=tmp_path,
        models=("tiny", "tiny-qwen"),
        count=2,
        seed=1,
        tuning_count=2,
        tuning_seed=2,
        trials=1,
        only=only,
        device="cpu",
        dtype="auto",
        batch_size=1,
        jobs=1,
        clock=ENDLESS,
    )
    assert study.conduct(wanted, ["defaults"])
    order = [name.rpartition(", ")[2] for name in begun[2]]
    assert list(dict.fromkeys(order)) == ["carve", "beam", "vcd", "spin"]
    assert order.count("carve") == 4, "captions and POPE of two models"


def test_the_model_that_is_kept_for_tests_is_not_searched_on():
    reasons = collections.defaultdict(str)
    assert {name: study.LISTED["tuned"](ANY, name, reasons) for name in UNSEARCHED} == {"small": {}}


def test_the_scenes_for_tuning_are_others(tmp_path):
    with pytest.raises(UsageError, match="both 3"):
        command(["--out", str(tmp_path), "--seed", "3", "--tuning-seed", "3"], standalone_mode=False)


def test_the_whole_study(tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = ["--out", str(out), "--model", "tiny", "--count", "3", "--tuning-count", "2", "--trials", "1", "--device"]
    given += ["cpu", "--batch-size", "40", "--decoder", "vcd:noise_step=900,plausibility=0.1", "--decoder", "var"]
    given += ["--stage", "defaults", "--stage", "tuned", "--dtype", "bfloat16"]
    with pytest.raises(SystemExit):
        command([*given, "--minutes", "0"], standalone_mode=False)
    assert "not run yet" in (out / "effects.md").read_text()
    command(given, standalone_mode=False)
    results = json.loads((out / "results.json").read_text())
    assert "python -m tools.study --out DIR --model tiny --decoder" in results["command"]
    assert "--stage defaults --stage tuned" in results["command"]
    assert "--jobs" not in results["command"]
    assert "--dtype bfloat16" in results["command"]
    found = results["models"]["tiny"]
    assert found["dtype"] == "bfloat16"
    rows = {row["name"].partition(":")[0]: row for row in found["rows"]}
    assert rows["vcd"]["captions"]["chair_i"]["value"] is not None
    assert 0 < rows["vcd"]["changed"] <= 1
    assert set(rows["vcd"]["pope"]) >= {f"{split}/{name}" for split in study.SPLITS for name in ("f1", "yes_ratio")}
    assert "sink" in rows["var"]["reason"]
    assert rows["var"]["captions"] is None
    (searched, idle) = found["tuned"]
    assert searched["search"]["trials"] == 1
    assert (searched["captions"] is not None) == bool(searched["search"]["spec"])
    assert "sink" in idle["reason"]
    monkeypatch.setattr(runs, "loaded", lambda *args, **named: pytest.fail("nothing is left to ask"))
    command(given, standalone_mode=False)
    assert json.loads((out / "results.json").read_text())["models"]["tiny"] == found
