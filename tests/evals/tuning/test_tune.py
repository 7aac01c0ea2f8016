"""Tuning: what is searched, on which pictures, within which guards, and what becomes of a killed search."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from tests.jobs.fake import FakeVLM, draw
from vlmfix.decoders import INTER, VCD, Greedy, LocoRE, parse
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.pope import Pope
from vlmfix.evals.record import PLAIN, EvalRun, Record
from vlmfix.evals.task import Sample, Task, Verdict, Workload, plain, ratio
from vlmfix.evals.tuning.halves import split
from vlmfix.evals.tuning.search import Space
from vlmfix.evals.tuning.tune import OBJECTIVES, Guards, arm_name, tune
from vlmfix.jobs.benchmark.job import evaluate as run_evaluation
from vlmfix.language.recipe import read_recipe, write_recipe
from vlmfix.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Counted(Task):
    """A caption benchmark whose answers are their own counts."""

    name: ClassVar[str] = "chair"
    better: ClassVar = {"chair_i": "lower", "recall": "higher"}
    shifts: ClassVar = ("length",)
    max_new_tokens: ClassVar[int] = 4

    def judge(self, sample, answer):
        return Verdict(counts={"answers": 1.0, **json.loads(answer)})

    def figures(self, sums):
        return {
            "chair_i": ratio(sums["wrong"], sums["named"]),
            "recall": ratio(sums["found"], sums["answers"]),
            "length": ratio(sums["words"], sums["answers"]),
        }

    def results(self, judged):
        return {name: plain(value) for name, value in self.figures(self.tally(judged).sums()).items()}


PICTURES = 80
WORK = Workload(
    samples=[Sample(id=f"{n}", image=f"{n}.png", prompt="?") for n in range(PICTURES)],
    images=None,
    about={"data": "drawn", "none": None},
)


def smooth(decoder, sample):
    """Best at contrast 0.4; too much contrast costs recall. Hallucinations depend on the picture a little."""
    contrast = decoder.contrast if isinstance(decoder, VCD) else 0.0
    hallucinated = 2.0 + 3 * math.log((contrast or 0.05) / 0.4) ** 2 + int(sample.id) % 3
    return {"wrong": hallucinated, "named": 20.0, "found": 0.6 - 0.02 * max(0.0, contrast - 0.5), "words": 50.0}


class Fake:
    """Runs arms by a formula, and counts."""

    def __init__(self, answer=smooth, fails=lambda decoder, sample: False, dies_after=None):
        self.answer, self.fails, self.dies_after = answer, fails, dies_after
        self.calls = []
        self.asked = {}

    def __call__(self, arms, workload, folder):
        if self.dies_after is not None and len(self.calls) >= self.dies_after:
            raise KeyboardInterrupt
        self.calls.append((folder.name, dict(arms)))
        known = self.asked.setdefault(folder.name, {})
        known |= arms
        self.images = {**getattr(self, "images", {}), folder.name: {sample.image for sample in workload.samples}}
        answers = {arm: {s.id: self._record(decoder, s) for s in workload.samples} for arm, decoder in known.items()}
        card = {
            "task": "chair",
            "options": {},
            "data": dict(workload.about),
            "samples": "sha256:x",
            "model": "tiny",
            "weights": "sha256:y",
            "arms": {arm: {"spec": decoder.spec()} for arm, decoder in known.items()},
        }
        return EvalRun(folder, card, Counted(), list(workload.samples), answers)

    def _record(self, decoder, sample):
        if self.fails(decoder, sample):
            return Record(sample.id, None, failed="broken")
        return Record(sample.id, json.dumps(self.answer(decoder, sample)))

    @property
    def tried(self):
        return [decoder.spec() for folder, arms in self.calls for name, decoder in arms.items() if name != PLAIN]


def go(out, evaluate, *, spec="vcd:noise_step=500,plausibility=0.1", budget=25, task=None, work=WORK, **options):
    settings = options.pop("settings", Settings())
    return tune(spec, work, task or Counted(), settings, budget=budget, out=out, evaluate=evaluate, **options)


def test_finds_what_is_best_and_reports_it_on_other_pictures(tmp_path):
    evaluate = Fake()
    found = go(tmp_path / "out", evaluate)
    assert len(found.trials) == 25
    assert found.chosen.parameters["contrast"] == pytest.approx(0.4, rel=0.15)
    assert found.chosen.spec == evaluate.calls[-1][1][found.chosen.arm].spec()
    assert [trial.chosen for trial in found.trials].count(True) == 1
    assert min(t.outcome.value for t in found.trials if t.feasible) == found.chosen.outcome.value < found.plain.value
    assert evaluate.images["tuning"] & evaluate.images["held-out"] == set()
    assert [folder for folder, _ in evaluate.calls] == ["tuning"] * 26 + ["held-out"]
    assert "chair_i changes by -0.6" in found.verdict
    assert found.verdict.endswith(": better.")
    (change,) = [c for c in found.held_out.arms[0].changes if c.figure == "chair_i"]
    assert change.difference.low <= change.difference.value <= change.difference.high < 0


def test_the_recipe_and_the_trials_say_what_a_contrast_left_alone(tmp_path):
    class Sure(Fake):
        def _record(self, decoder, sample):
            return replace(super()._record(decoder, sample), ids=(1, 2, 3, 4), skipped=3 if decoder.waiting else None)

    found = go(tmp_path / "out", Sure(), spec="vcd:noise_step=500,plausibility=0.1,when=uncertain", budget=6)
    assert found.plain.skip_rate is None
    assert {trial.outcome.skip_rate for trial in found.trials} == {0.75}
    recipe = read_recipe(found.recipe)
    assert "skip_rate" not in recipe["tuning"]["plain"]
    assert recipe["tuning"]["recipe"]["skip_rate"] == recipe["held-out"]["skip_rate"] == 0.75


def test_the_recipe_says_what_was_done(tmp_path):
    found = go(tmp_path / "out", Fake(), budget=12)
    recipe = read_recipe(found.recipe)
    decoder = parse(f"@{found.recipe}")
    assert decoder.spec() == recipe["decoder"] == found.chosen.spec
    assert (decoder.noise_step, decoder.plausibility) == (500, 0.1)
    assert recipe["model"]["weights"] == "sha256:y"
    assert recipe["split"]["seed"] == 0
    assert recipe["split"]["tuning"]["pictures"] == recipe["split"]["held-out"]["pictures"] == 40
    assert recipe["split"]["tuning"]["digest"] != recipe["split"]["held-out"]["digest"]
    assert recipe["search"]["trials"] == 12
    assert recipe["search"]["tuned"] == ["contrast"]
    assert recipe["tuning"]["plain"]["value"] == found.plain.value
    assert recipe["tuning"]["recipe"]["value"] == found.chosen.outcome.value
    held_out = recipe["held-out"]["figures"]["chair_i"]
    assert held_out["low"] <= held_out["difference"] <= held_out["high"]
    assert held_out["plain"] + held_out["difference"] == pytest.approx(held_out["recipe"])
    assert held_out["recipe"] < held_out["plain"]
    assert recipe["data"] == {"data": "drawn"}
    assert "torch" in recipe["versions"]


def test_the_same_seed_searches_the_same(tmp_path):
    first, again, other = Fake(), Fake(), Fake()
    go(tmp_path / "a", first, budget=14)
    go(tmp_path / "b", again, budget=14)
    go(tmp_path / "c", other, budget=14, seed=1)
    assert first.tried == again.tried
    assert first.tried != other.tried
    assert len(set(first.tried)) > 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go(tmp_path_factory.mktemp("whole") / "out", Fake(), budget=14)


@pytest.mark.parametrize("dies_after", [0, 1, 2, 13, 15])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path, whole, dies_after):
    killed = Fake(dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "out", killed, budget=14)
    with (tmp_path / "out" / "trials.jsonl").open("ab") as journal:
        journal.write(b'{"parameters":')
    resumed = Fake()
    found = go(tmp_path / "out", resumed, budget=14)
    assert found.trials == whole.trials
    assert found.verdict == whole.verdict
    assert len(resumed.tried) == 14 + 1 - len(killed.tried)


def test_a_larger_budget_adds_trials(tmp_path):
    few = go(tmp_path / "out", Fake(), budget=5)
    more = go(tmp_path / "out", Fake(), budget=8)
    assert [replace(t, chosen=False) for t in more.trials[:5]] == [replace(t, chosen=False) for t in few.trials]
    assert len(more.trials) == 8
    evaluate = Fake()
    assert len(go(tmp_path / "out", evaluate, budget=3).trials) == 8
    assert len(evaluate.tried) == 1, "only the held-out run is asked for again"


def test_the_search_begins_with_the_decoder_as_specified(tmp_path):
    evaluate = Fake()
    go(tmp_path / "out", evaluate, spec="vcd:preset=official-code", budget=2)
    assert evaluate.tried[0] == VCD(preset="official-code").spec()
    assert evaluate.tried[1] != evaluate.tried[0]


@pytest.mark.parametrize(
    ("found", "before", "broken"),
    [
        ({"found": 0.58}, {"found": 0.6}, set()),
        ({"found": 0.579}, {"found": 0.6}, {"recall"}),
        ({"words": 45.0}, {"words": 50.0}, set()),
        ({"words": 44.9}, {"words": 50.0}, {"length"}),
        ({"found": 0.9, "words": 90.0}, {"found": 0.6, "words": 50.0}, set()),
        ({"named": 0.0}, {}, {"value"}),
    ],
)
def test_guards(tmp_path, found, before, broken):
    def answer(decoder, sample):
        counts = {"wrong": 1.0, "named": 10.0, "found": 0.6, "words": 50.0}
        return counts | (before if isinstance(decoder, Greedy) else {"wrong": 0.0} | found)

    result = go(tmp_path / "out", Fake(answer), budget=1)
    assert result.trials[0].feasible == (not broken)
    assert (result.recipe is None) == bool(broken)
    kept = Guards().constraints(result.trials[0].outcome, result.plain)
    assert {name for name, value in kept.items() if value > 0} == broken


def test_guards_can_be_loosened(tmp_path):
    def answer(decoder, sample):
        plain = isinstance(decoder, Greedy)
        return {"wrong": float(plain), "named": 10.0, "found": 0.6 if plain else 0.5, "words": 50.0 if plain else 30.0}

    loose = Guards(max_recall_loss=0.1, max_length_loss=0.4)
    assert go(tmp_path / "strict", Fake(answer), budget=1).recipe is None
    assert go(tmp_path / "loose", Fake(answer), budget=1, guards=loose).recipe is not None
    with pytest.raises(UsageError, match=r"max_length_loss=10.*\[0, 1\]"):
        Guards(max_length_loss=10)


def test_what_is_lost_on_the_held_out_split_alone_is_said(tmp_path):
    unseen = {sample.id for sample in split(WORK, 0)[1].samples}

    def answer(decoder, sample):
        plain = isinstance(decoder, Greedy)
        lost = not plain and sample.id in unseen
        return {"wrong": float(plain), "named": 10.0, "found": 0.5 if lost else 0.6, "words": 30.0 if lost else 50.0}

    found = go(tmp_path / "out", Fake(answer), budget=1)
    assert found.verdict.endswith(
        "better, while length changes too. It loses more recall and length there than the guards allow."
    )


def test_a_decoder_that_breaks_samples_is_not_chosen(tmp_path):
    found = go(tmp_path / "out", Fake(fails=lambda decoder, s: isinstance(decoder, VCD) and s.id in "0123"), budget=2)
    assert found.recipe is None
    assert "none of 2 trials stays within the guards" in found.verdict
    both = go(tmp_path / "both", Fake(fails=lambda decoder, s: s.id == "7"), budget=8)
    assert both.recipe is not None, "what breaks plain decoding too is no fault of the decoder"


def test_constraints_guide_the_search_past_what_is_forbidden(tmp_path):
    def answer(decoder, sample):  # ever better with more contrast, but from 0.5 on recall falls
        contrast = decoder.contrast if isinstance(decoder, VCD) else 0.0
        return {"wrong": 5 - contrast, "named": 20.0, "found": 0.6 if contrast < 0.5 else 0.3, "words": 50.0}

    found = go(tmp_path / "out", Fake(answer), budget=30)
    assert found.chosen.feasible
    assert 0.4 < found.chosen.parameters["contrast"] < 0.5
    assert any(not trial.feasible and trial.outcome.value < found.chosen.outcome.value for trial in found.trials)


def test_plain_is_best(tmp_path):
    def answer(decoder, sample):
        return {"wrong": 2.0, "named": 20.0, "found": 0.6, "words": 50.0}

    evaluate = Fake(answer)
    found = go(tmp_path / "out", evaluate, budget=4)
    assert found.recipe is found.held_out is found.chosen is None
    assert found.verdict == "Plain is best: none of the 4 trials within the guards (4 in all) beats it."
    assert not (tmp_path / "out" / "recipe.toml").exists()
    assert "held-out" not in evaluate.asked


def test_what_a_specification_leaves_open():
    assert list(Space.of("vcd").axes) == ["contrast", "plausibility", "noise_step"]
    assert list(Space.of("vcd:contrast=0.5,noise_seed=3").axes) == ["plausibility", "noise_step"]
    chain = Space.of("vcd:plausibility=0.2+inter:variance=2+locore+locore:mode=post")
    assert "vcd.contrast" in chain.axes
    assert "vcd.plausibility" not in chain.axes
    assert "inter.mask_text" in chain.axes
    assert {"locore.mode", "locore-2.strength"} <= chain.axes.keys()
    assert "locore-2.mode" not in chain.axes
    built = chain.build({"vcd.contrast": 0.7, "locore-2.window": 3, "inter.mask_text": "drop_turn"})
    assert built.decoders == (
        VCD(contrast=0.7, plausibility=0.2),
        INTER(variance=2.0, mask_text="drop_turn"),
        LocoRE(),
        LocoRE(mode="post", window=3),
    )


def test_all_kinds_of_parameters_are_searched(tmp_path):
    evaluate = Fake(lambda decoder, sample: smooth(Greedy(), sample))
    found = go(tmp_path / "out", evaluate, spec="locore+inter:mask_image=zeros", budget=12, seed=1)
    tried = [trial.parameters for trial in found.trials]
    assert tried[0] | {"locore.strength": 0} == {
        "locore.strength": 0,
        "locore.window": 5,
        "locore.mode": "renorm",
        "locore.scope": "post_image",
        "inter.variance": 1.0,
        "inter.plausibility": 0.1,
        "inter.mask_text": "empty",
    }
    assert {one["locore.mode"] for one in tried} == {"renorm", "post", "score"}
    assert all(1 <= one["locore.window"] <= 20 and type(one["locore.window"]) is int for one in tried)
    assert all(parse(trial.spec).decoders[1].mask_image == "zeros" for trial in found.trials)
    assert all(len(f"{one['inter.variance']:.10g}".replace("0.", "").lstrip("0")) <= 4 for one in tried)


def test_a_recipe_can_be_a_part_of_what_is_tuned(tmp_path):
    write_recipe(tmp_path / "a.toml", VCD(contrast=0.3).spec(), {})
    assert all(name.startswith("locore.") for name in Space.of(f"@{tmp_path / 'a.toml'}+locore").axes)
    with pytest.raises(UsageError, match="leaves nothing to tune"):
        Space.of(f"@{tmp_path / 'a.toml'}")


def test_the_split_keeps_pictures_together():
    samples = [Sample(id=f"{n}/{q}", image=f"{n}.png", prompt=q, group=q) for n in range(9) for q in "abc"]
    work = Workload(samples=samples, images=None, about={"data": 1})
    first, second = split(work, 0)
    assert (len(first.samples), len(second.samples)) == (12, 15)
    assert {s.image for s in first.samples} & {s.image for s in second.samples} == set()
    assert sorted(s.id for part in (first, second) for s in part.samples) == sorted(s.id for s in samples)
    assert [s.id for s in first.samples] == [s.id for s in samples if s in first.samples]
    assert first.about == {"data": 1, "split": {"part": "tuning", "seed": 0}}
    assert split(replace(work, samples=samples[::-1]), 0)[0].samples == first.samples[::-1]
    assert len({tuple(s.id for s in split(work, seed)[0].samples) for seed in range(6)}) > 3
    with pytest.raises(DataError, match="1 pictures cannot be split"):
        split(replace(work, samples=samples[:3]), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "greedy"}, "greedy leaves nothing to tune.*vcd: contrast, plausibility, noise_step"),
        ({"spec": "vdc"}, "unknown decoder"),
        ({"spec": "vcd:noise_seed=-1"}, "noise_seed=-1 is not allowed"),
        ({"budget": 0}, "budget=0"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, options, message):
    evaluate = Fake()
    with pytest.raises(UsageError, match=message):
        go(tmp_path / "out", evaluate, **options)
    assert not evaluate.calls
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_kept_for_tests_is_not_searched_on(tmp_path):
    with pytest.raises(UsageError, match="nothing is searched on 'small'"):
        go(tmp_path / "out", Fake(), settings=Settings(model="small"))
    assert not (tmp_path / "out").exists()


def test_a_task_without_an_objective(tmp_path, monkeypatch):
    monkeypatch.delitem(OBJECTIVES, "chair")
    with pytest.raises(UsageError, match=r"chair cannot be tuned for.*pope"):
        go(tmp_path / "out", Fake())


def test_another_search_is_refused(tmp_path):
    go(tmp_path / "out", Fake(), budget=2)
    for options in ({"spec": "vcd"}, {"seed": 1}, {"guards": Guards(max_recall_loss=0.5)}):
        with pytest.raises(UsageError, match=rf"{next(iter(options))}[.\w]* was"):
            go(tmp_path / "out", Fake(), **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="is not empty"):
        go(tmp_path / "full", Fake())
    with pytest.raises(DataError, match="cannot make the folder"):
        go(tmp_path / "full" / "file" / "out", Fake())


def test_plain_without_a_value(tmp_path):
    empty = {"wrong": 0.0, "named": 0.0, "found": 0.0, "words": 0.0}
    with pytest.raises(DataError, match="plain decoding has no chair_i"):
        go(tmp_path / "out", Fake(lambda decoder, sample: empty))


class Contrasted(FakeVLM):
    """Says yes to everything when plain, and tells right from wrong when the contrast is strong enough."""

    def generate(self, pictures, prompts, **options):
        decoder = options["decoder"]
        strong = isinstance(decoder, VCD) and decoder.contrast > 0.3
        answers = super().generate(pictures, prompts, **options)
        return [
            replace(answer, text="No, there is none." if strong and "cat" in prompt else "Yes, there is one.")
            for answer, prompt in zip(answers, prompts, strict=True)
        ]


def test_with_the_real_runner_on_pope(tmp_path):
    draw(tmp_path / "in", 8)
    samples = [
        Sample(
            id=f"random/{number}/{name}",
            image=f"{number:04d}.png",
            prompt=f"Is there a {name} in the image?",
            target={"label": label},
            group="random",
        )
        for number in range(8)
        for name, label in (("dog", "yes"), ("cat", "no"))
    ]
    work = Workload(samples=samples, images=tmp_path / "in", about={"questions": "drawn"})
    vlm = Contrasted()

    def evaluate(arms, part, folder):
        return run_evaluation(folder, Pope(), part, Settings(), arms, batch_size=4, loader=vlm.load)

    found = go(tmp_path / "out", evaluate, spec="vcd:noise_step=500,plausibility=0.1", work=work, task=Pope(), budget=6)
    assert (found.objective, found.better) == ("mean/f1", "higher")
    assert found.plain.value == pytest.approx(2 / 3)
    assert found.plain.recall == found.chosen.outcome.recall == found.chosen.outcome.value == 1
    assert found.chosen.parameters["contrast"] > 0.3
    assert found.chosen.arm == arm_name(parse(f"@{found.recipe}"))
    read = read_recipe(found.recipe)
    assert read["model"]["weights"].startswith(("commit:", "sha256:"))
    assert read["held-out"]["figures"]["mean/f1"]["difference"] == pytest.approx(1 / 3)
    batches = len(vlm.batches)
    again = go(tmp_path / "out", evaluate, spec="vcd:noise_step=500,plausibility=0.1", work=work, task=Pope(), budget=6)
    assert again.trials == found.trials
    assert len(vlm.batches) == batches, "a finished search asks the model nothing"


def test_a_damaged_journal_is_told_in_words(tmp_path):
    whole = tmp_path / "whole"
    go(whole, Fake(), budget=3)
    lines = (whole / "trials.jsonl").read_bytes().splitlines(keepends=True)
    damages = [
        [b"nonsense\n", *lines],
        [*lines[:2], b"[" * 100_000 + b"\n", *lines[2:]],
        [lines[0], b"{}\n"],
        [lines[0].replace(b'"about"', b'"abbut"')],
        [lines[0].replace(b'"contrast"', b'"contrasu"')],
        [lines[0].replace(b'"contrast": 1.0', b'"contrast": true')],
        [lines[0].replace(b'"contrast": 1.0', b'"contrast": 1e9')],
        [lines[0].replace(b'"failed": 0', b'"failed": "no"'), *lines[1:]],
    ]
    assert lines not in damages
    assert lines[:1] not in damages
    for number, damaged in enumerate(damages):
        out = tmp_path / str(number)
        shutil.copytree(whole, out)
        (out / "trials.jsonl").write_bytes(b"".join(damaged))
        with pytest.raises(DataError, match=r"trials\.jsonl"):
            go(out, Fake(), budget=3)


def test_what_a_journal_says_besides_is_passed_over(tmp_path):
    found = go(tmp_path / "out", Fake(), budget=3)
    journal = tmp_path / "out" / "trials.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"about": {', b'"about": {"unknown": [1], '))
    assert b"unknown" in journal.read_bytes()
    assert go(tmp_path / "out", Fake(), budget=3).trials == found.trials


def test_files_of_something_else_are_not_touched(tmp_path):
    for name, text in (("tune.json", '{"my": "own"}'), ("trials.jsonl", "notes"), ("recipe.toml", "x = 1")):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text(text)
        with pytest.raises(UsageError, match=r"tune\.json"):
            go(out, Fake(), budget=2)
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, text)]
