from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from tests.evals.exam import Exam, answers, exam, samples, written
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.comparison.statistics import swap_test
from vlmfix.evals.record import PLAIN, Record, read_run
from vlmfix.evals.tasks import TASKS

DRAWS = 2000


def changes(comparison, arm):
    return {change.figure: change for found in comparison.arms if found.name == arm for change in found.changes}


@pytest.fixture(scope="module")
def comparison():
    return compare([exam()], draws=DRAWS)


def test_values_are_those_of_the_task_and_the_difference_is_theirs(comparison):
    run = exam()
    for name, change in changes(comparison, "good").items():
        assert change.arm.value == run.task.results(run.judged("good"))[name]
        assert change.plain.value == run.task.results(run.judged(PLAIN))[name]
        assert change.difference.value == pytest.approx(change.arm.value - change.plain.value)
    for change in comparison.plain[0].changes:
        assert change.difference.value == change.difference.low == change.difference.high == 0
        assert change.test == ""


def test_every_figure_has_intervals_that_hold_its_value(comparison):
    for arm in comparison.arms:
        for change in arm.changes:
            for estimate in (change.plain, change.arm, change.difference):
                assert estimate.low <= estimate.value <= estimate.high, change.figure


def test_better_worse_and_neither(comparison):
    good, wordy = changes(comparison, "good"), changes(comparison, "wordy")
    assert good["easy/accuracy"].direction == "better"
    assert good["easy/misses"].direction == "better", "fewer is better"
    assert good["easy/misses"].difference.value < 0
    assert wordy["easy/accuracy"].direction == "no clear difference"
    swapped = exam(arms={PLAIN: exam().answers["good"], "bad": exam().answers[PLAIN]})
    assert changes(compare([swapped], draws=DRAWS), "bad")["easy/accuracy"].direction == "worse"


def test_a_mark_names_the_shifts_beside_it_that_are_clear():
    asked = samples()
    keen = {
        name: replace(record, answer="yes, indeed")
        for name, record in answers(asked, {"easy": 0.8, "hard": 0.5}, seed=0).items()
    }
    plain = answers(asked, {"easy": 0.8, "hard": 0.5}, seed=0)
    found = changes(compare([exam(asked=asked, arms={PLAIN: plain, "keen": keen})], draws=DRAWS), "keen")
    assert found["hard/misses"].direction == "better"
    assert found["hard/misses"].shifted == ("hard/yes_ratio", "hard/length")
    assert found["hard/accuracy"].direction == "no clear difference"
    assert found["hard/accuracy"].shifted == ()
    good = changes(compare([exam()], draws=DRAWS), "good")
    assert (good["hard/accuracy"].direction, good["hard/accuracy"].shifted) == ("better", ())
    (longer,) = (
        c
        for c in changes(
            compare(
                [
                    exam(
                        arms={
                            PLAIN: plain,
                            "longer": {
                                name: replace(record, answer=f"{record.answer} indeed")
                                for name, record in exam().answers["good"].items()
                            },
                        }
                    )
                ],
                draws=DRAWS,
            ),
            "longer",
        ).values()
        if c.figure == "mean/accuracy"
    )
    assert longer.shifted == ("easy/length", "hard/length"), "a mean has none of its own: it has those of its groups"


def test_shifts_stand_beside_and_are_not_tested(comparison):
    wordy = changes(comparison, "wordy")
    assert wordy["easy/length"].kind == "shift"
    assert (wordy["easy/length"].difference.low, wordy["easy/length"].direction) == (2, "")
    assert wordy["easy/n"].kind == "other"
    assert all(change.p is None for change in wordy.values() if change.kind != "merit")


def test_all_merits_are_tested_by_swaps_and_corrected_together(comparison):
    run = exam()
    tallies = {arm: run.task.tally(run.judged(arm)) for arm in run.answers}
    merits = [f"{group}/{name}" for group in ("easy", "hard") for name in ("accuracy", "precision", "misses")]
    merits.append("mean/accuracy")
    for arm in ("good", "wordy"):
        found = swap_test(run.task.figures, tallies[PLAIN], tallies[arm], merits, draws=DRAWS, seed=0)
        tested = {name: change for name, change in changes(comparison, arm).items() if change.test}
        assert tested.keys() == found.keys()
        for name, change in tested.items():
            assert (change.test, change.p) == ("swaps", found[name].p)
            assert change.corrected == min(1, 2 * found[name].corrected), "times two, for two arms"
    alone = compare([exam(arms={name: exam().answers[name] for name in (PLAIN, "good")})], draws=DRAWS)
    assert changes(alone, "good")["hard/misses"].corrected == changes(comparison, "good")["hard/misses"].corrected / 2


def test_an_arm_that_was_not_tested_costs_the_others_nothing():
    run = exam()
    before = changes(compare([run], draws=DRAWS), "good")["hard/precision"]
    run.answers["wordy"].clear()
    after = changes(compare([run], draws=DRAWS), "good")["hard/precision"]
    assert after.corrected == before.corrected / 2


def test_questions_about_one_unit_are_one_piece_of_evidence():
    """Forty questions more are right, all of them about one picture in eleven."""
    asked = [replace(sample, unit="one" if int(sample.image[:3]) < 10 else "") for sample in samples(50)]
    better = answers(asked, {"easy": 1.0, "hard": 1.0}, seed=0)
    wrong = answers(asked, {"easy": 0.0, "hard": 0.0}, seed=0)
    plain = {sample.id: (wrong if sample.unit else better)[sample.id] for sample in asked}
    change = changes(compare([exam(asked=asked, arms={PLAIN: plain, "one": better})], draws=DRAWS), "one")[
        "easy/accuracy"
    ]
    assert change.difference.value == pytest.approx(0.2)
    assert (change.p, change.direction) == (1, "no clear difference")


@pytest.mark.parametrize(
    ("pictures", "direction"), [(6, "too few units to tell"), (29, "too few units to tell"), (30, "better")]
)
def test_few_units_get_no_verdict_however_large_the_difference(pictures, direction):
    asked = samples(pictures)
    arms = {
        PLAIN: answers(asked, {"easy": 0.0, "hard": 0.0}, seed=0),
        "right": answers(asked, {"easy": 1.0, "hard": 1.0}, seed=0),
    }
    found = changes(compare([exam(asked=asked, arms=arms)], draws=DRAWS), "right")
    assert {change.direction for change in found.values() if change.kind == "merit"} == {direction}
    assert found["easy/accuracy"].difference.low > 0


def test_a_group_of_few_pictures_gets_no_verdict_among_others_that_have_many():
    asked = [sample for sample in samples(60) if sample.group == "hard" or int(sample.image[:3]) < 8]
    arms = {
        PLAIN: answers(asked, {"easy": 0.0, "hard": 0.0}, seed=0),
        "right": answers(asked, {"easy": 1.0, "hard": 1.0}, seed=0),
    }
    found = changes(compare([exam(asked=asked, arms=arms)], draws=DRAWS), "right")
    assert found["easy/accuracy"].direction == "too few units to tell"
    assert found["hard/accuracy"].direction == found["mean/accuracy"].direction == "better"


def test_seeds_reproduce(comparison):
    assert compare([exam()], draws=DRAWS) == comparison
    assert compare([exam()], draws=DRAWS, seed=1) != comparison


def test_only_samples_that_both_answered_are_compared():
    run = exam()
    names = [sample.id for sample in run.samples]
    run.answers["good"][names[0]] = Record(id=names[0], answer=None, failed="NaN")
    run.answers[PLAIN][names[1]] = Record(id=names[1], answer=None, failed="NaN")
    for name in names[-10:]:
        del run.answers["good"][name]
    comparison = compare([run], draws=DRAWS)
    good, wordy = comparison.arms
    assert (good.compared, good.failed, good.missing) == (240 - 12, 1, 10)
    assert (wordy.compared, wordy.failed, wordy.missing) == (239, 0, 0)
    assert {c.figure: c.plain.value for c in good.changes}["easy/n"] == 118
    assert {c.figure: c.arm.value for c in good.changes}["easy/n"] == 118
    assert {c.figure: c.arm.value for c in comparison.plain[0].changes}["easy/n"] == 119
    assert any("good is incomplete: 1 failed, 10 not asked yet" in note for note in comparison.notes)


def test_an_arm_without_answers_is_named_and_holds_nothing():
    run = exam()
    run.answers["good"].clear()
    good, wordy = compare([run], draws=DRAWS).arms
    assert (good.compared, good.changes) == (0, ())
    assert wordy.changes
    run.answers["wordy"].clear()
    with pytest.raises(DataError, match="no sample"):
        compare([run], draws=DRAWS)


def test_figures_without_a_value_have_none_and_no_direction():
    asked = samples()
    mute = answers(asked, {"easy": 0.5, "hard": 0.5}, seed=0)
    mute = {name: replace(record, answer="no") for name, record in mute.items()}
    comparison = compare([exam(asked=asked, arms=exam(asked=asked).answers | {"mute": mute})], draws=DRAWS)
    change = changes(comparison, "mute")["easy/precision"]
    assert (change.arm.value, change.difference.value, change.difference.low, change.p) == (None, None, None, None)
    assert change.plain.value is not None
    assert change.direction == ""
    assert "NaN" not in json.dumps(asdict(comparison))


def test_unparsed_answers_are_counted():
    run = exam()
    run.answers["good"] |= {
        name: replace(run.answers["good"][name], answer="maybe") for name in list(run.answers["good"])[:3]
    }
    assert [arm.unparsed for arm in compare([run], draws=DRAWS).arms] == [3, 0]


def test_few_units_are_noted(comparison):
    assert comparison.notes == ()
    assert comparison.unit == "pictures"
    notes = compare([exam(asked=samples(12))], draws=DRAWS).notes
    assert any("Only 12" in note for note in notes)


def test_arms_of_the_same_name_get_their_folders_name():
    first, second = exam("x/first"), exam("x/second")
    del second.answers["wordy"]
    comparison = compare([first, second], draws=DRAWS)
    assert [arm.name for arm in comparison.plain] == [PLAIN]
    assert [arm.name for arm in comparison.arms] == ["first/good", "wordy", "second/good"]
    twins = compare([exam("x/run"), exam("y/run")], draws=DRAWS)
    assert [arm.name for arm in twins.arms][::2] == ["x/run/good", "y/run/good"]


def test_plain_arms_that_differ_are_told_apart():
    first, second = exam("first"), exam("second")
    for name in list(second.answers[PLAIN])[:7]:
        second.answers[PLAIN][name] = replace(second.answers[PLAIN][name], answer="no, none")
    comparison = compare([first, second], draws=DRAWS)
    assert [arm.name for arm in comparison.plain] == ["first/greedy", "second/greedy"]
    assert [arm.plain for arm in comparison.arms] == ["first/greedy"] * 2 + ["second/greedy"] * 2
    assert any("answer 7 of 240 samples differently" in note for note in comparison.notes)
    assert changes(comparison, "first/good")["easy/length"].plain.value == 1
    assert changes(comparison, "second/good")["easy/length"].plain.value > 1


READING = {"ends": [2], "set_aside": {}, "completed": {}}
NOTED = {"files": {"vocab.json": "sha256:1"}, "checkpoint": READING}


def test_a_run_of_an_earlier_version_is_compared_and_noted():
    notes = compare([exam("first", **NOTED), exam("second")], draws=DRAWS).notes
    assert any("earlier vlmfix" in note and note.endswith("act: second.") for note in notes)


def test_settings_of_the_checkpoint_that_do_not_act_are_noted():
    aside = {"checkpoint": READING | {"set_aside": {"repetition_penalty": 1.05}}}
    assert "repetition_penalty 1.05" in compare([exam("first", **aside)], draws=DRAWS).notes[0]


class Other(Exam):
    name = "other"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"task": Other()}, "task is 'exam' and 'other'"),
        ({"task": Exam(strict=True)}, "options.strict is False and True"),
        ({"weights": "sha256:78"}, "weights is 'sha256:77' and 'sha256:78'"),
        ({"files": {"vocab.json": "sha256:2"}}, "files.vocab.json is 'sha256:1' and 'sha256:2'"),
        ({"checkpoint": READING | {"ends": [2, 5]}}, "checkpoint.ends is [2] and [2, 5]"),
        ({"commit": "abc"}, "commit is None and 'abc'"),
        ({"revision": "v2"}, "revision is None and 'v2'"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' and 'bfloat16'"),
        ({"data": {"questions": {"sha256": "ff"}}}, "data.questions.sha256 is '12ab' and 'ff'"),
        (
            {"decoding": {"max_new_tokens": 512, "num_beams": 1, "temperature": 0.0, "seed": 0}},
            "decoding.max_new_tokens is 8 and 512",
        ),
        ({"asked": samples(61)}, "samples are 240 and 244, 4 of them in one run only"),
        (
            {"asked": samples(prompt="Do you see a {}?")},
            "prompt of easy-0-0 is 'Is there a cat?' and 'Do you see a cat?'",
        ),
        ({"asked": samples()[::-1]}, "order"),
        (
            {"asked": [replace(sample, target={"label": "no"}) for sample in samples()]},
            "truth of easy-0-0 is {'label': 'yes'} and {'label': 'no'}",
        ),
        ({"asked": [replace(sample, image="x.png") for sample in samples()]}, "picture of easy-0-0 is '000.png' and"),
        ({"asked": [replace(sample, unit="all") for sample in samples()]}, "unit of easy-0-0 is '' and 'all'"),
    ],
)
def test_runs_that_differ_are_refused_with_both_values(other, said):
    with pytest.raises(UsageError) as refused:
        compare([exam("first", **NOTED), exam("second", **NOTED | other)], draws=DRAWS)
    assert said in refused.value.message
    assert "first and second" in refused.value.message


def seen(run, digests, arms=(PLAIN, "good", "wordy")):
    """The run with the digests of its pictures."""
    for arm in arms:
        for sample in run.samples:
            digest = digests.get(sample.image, f"sha of {sample.image}")
            run.answers[arm][sample.id] = replace(run.answers[arm][sample.id], sha256=digest)
    return run


def test_runs_that_saw_other_pictures_are_refused():
    blurred = {f"{number:03}.png": f"blurred {number}" for number in range(7)}
    first, second = seen(exam("first"), {}), seen(exam("second"), blurred)
    with pytest.raises(UsageError) as refused:
        compare([first, second], draws=DRAWS)
    assert "first and second cannot be compared" in refused.value.message
    assert "the contents of 7 of 60 pictures differ: 000.png, 001.png" in refused.value.message
    assert "004.png and 2 more" in refused.value.message
    assert compare([first, seen(exam("second"), {})], draws=DRAWS).arms
    assert compare([first, exam("second")], draws=DRAWS).arms, "nothing is known of what the second saw"


def test_only_pictures_that_both_answered_must_be_the_same():
    first, second = seen(exam("first"), {}), seen(exam("second"), {"000.png": "blurred"})
    for arm in second.answers.values():
        for name in [sample.id for sample in second.samples if sample.image == "000.png"]:
            arm[name] = replace(arm[name], answer=None, failed="NaN")
    assert compare([first, second], draws=DRAWS).arms


def test_an_arm_that_saw_other_pictures_than_its_plain_arm_is_refused():
    run = seen(seen(exam(), {}), {"003.png": "blurred", "004.png": "blurred too"}, ["good"])
    with pytest.raises(UsageError, match=r"in run are about several contents of 2 of 60 pictures: 003.png, 004.png"):
        compare([run], draws=DRAWS)


def test_all_that_differs_is_named():
    with pytest.raises(UsageError, match=r"weights is .*; dtype is .*"):
        compare([exam("first"), exam("second", weights="other", dtype="float16")], draws=DRAWS)


def test_moved_files_other_names_and_branches_are_no_difference():
    questions = {"file": "renamed.json", "sha256": "12ab", "generation": "the one that a newer version knows"}
    moved = {"data": {"questions": questions, "path": "/mnt/exam.json"}}
    first = exam("first", commit="abc", revision="main")
    second = exam("second", commit="abc", revision="abc", images="/mnt/pictures", **moved)
    assert len(compare([first, second], draws=DRAWS).arms) == 4


def test_other_versions_are_noted():
    sessions = [{"versions": {"vlmfix": "1.0", "torch": "2.15", "transformers": "5.24"}}]
    (note,) = compare([exam("first"), exam("second", sessions=sessions)], draws=DRAWS).notes
    assert note == "Made with several versions of transformers: 5.23 (first), 5.24 (second)."


def test_plain_alone_has_its_intervals():
    found = compare([exam(arms={PLAIN: exam().answers["good"]})], draws=DRAWS)
    assert found.arms == ()
    assert all(change.arm.low <= change.arm.value <= change.arm.high for change in found.plain[0].changes)


def test_what_cannot_be_compared_says_why():
    good = exam().answers["good"]
    with pytest.raises(UsageError, match="no plain arm"):
        compare([exam(arms={"good": good})], draws=DRAWS)
    with pytest.raises(UsageError, match="given twice"):
        compare([exam(), exam()], draws=DRAWS)
    with pytest.raises(UsageError, match="draws=999 is too few for 2 arms"):
        compare([exam()], draws=999)
    arms = {PLAIN: good} | {str(number): good for number in range(26)}
    with pytest.raises(UsageError, match="give 10400 or more"):
        compare([exam(arms=arms)])
    with pytest.raises(UsageError, match="no run"):
        compare([], draws=DRAWS)


def test_a_run_on_the_disk_gives_the_same(tmp_path, monkeypatch, comparison):
    monkeypatch.setitem(TASKS.homes, "exam", "tests.evals.exam:Exam")
    found = compare([read_run(written(exam(tmp_path / "run")))], draws=DRAWS)
    assert [arm.changes for arm in found.arms] == [arm.changes for arm in comparison.arms]
    assert found.card == comparison.card
