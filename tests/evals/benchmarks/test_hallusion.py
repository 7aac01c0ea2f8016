"""HallusionBench's five figures: small sets by hand, and a full-size set with the published one's counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.hallusion import Hallusion, judged_before, read
from vlmfix.evals.task import Judged, Workload

IMAGES = Path("pictures")


def items(category: str, subcategory: str, figures: str, truths: list[str]) -> list[dict[str, Any]]:
    """One set of questions: for each figure its kind (visual_input), and for each the truths of all questions."""
    return [
        {
            "category": category,
            "subcategory": subcategory,
            "visual_input": kind,
            "set_id": "0",
            "figure_id": str(figure),
            "sample_note": "",
            "question_id": str(question),
            "question": f"Is it {question}?",
            "gt_answer": truth,
            "gt_answer_details": "",
            "filename": None if kind == "0" else f"./hallusion_bench/{category}/{subcategory}/0_{figure}.png",
        }
        for figure, (kind, row) in enumerate(zip(figures, truths, strict=True))
        for question, truth in enumerate(row)
    ]


def load(tmp_path: Path, entries: list[dict[str, Any]], **options: Any) -> Workload:
    path = tmp_path / "HallusionBench.json"
    path.write_text(json.dumps(entries))
    return read(path, IMAGES, **options)


def judge(task: Hallusion, workload: Workload, answers: dict[str, str], default: str = "Yes") -> list[Judged]:
    return [(sample, task.judge(sample, answers.get(sample.id, default))) for sample in workload.samples]


# Sets that together have the published benchmark's counts, found with an integer program over small sets: category,
# kind of every figure, truths by figure, how many such sets. The counts themselves are tested below.
SETS = [
    ("VD", "12", ["0011", "0100"], 60),
    ("VD", "122", ["11", "01", "01"], 17),
    ("VD", "122", ["111", "001", "001"], 1),
    ("VS", "01", ["00001", "00110"], 5),
    ("VS", "02", ["0001", "1110"], 2),
    ("VS", "012", ["0", "0", "1"], 6),
    ("VS", "012", ["01", "01", "10"], 51),
    ("VS", "0122", ["00", "01", "01", "00"], 14),
    ("VS", "0122", ["001", "010", "101", "101"], 2),
    ("VS", "0122", ["011", "101", "111", "110"], 1),
]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    entries = [
        entry
        for row, (category, figures, truths, times) in enumerate(SETS)
        for number in range(times)
        for entry in items(category, f"{row}-{number}", figures, truths)
    ]
    return load(tmp_path_factory.mktemp("hallusion"), entries)


def test_the_full_size_set_has_the_published_counts(full_size: Workload) -> None:
    samples = full_size.samples
    assert len(samples) == 1129
    assert Counter(sample.id[:2] for sample in samples) == {"VD": 591, "VS": 538}
    assert sum(sample.image is None for sample in samples) == 178
    groups = {
        name: {s.target["groups"][name][0] for s in samples if name in s.target["groups"]} for name in ("fAcc", "qAcc")
    }
    assert {name: len(found) for name, found in groups.items()} == {"fAcc": 346, "qAcc": 455}
    assert sum("easy" in sample.target["groups"] for sample in samples) == 625
    assert sum("hard" in sample.target["groups"] for sample in samples) == 504


def test_always_yes_has_the_published_figures(full_size: Workload) -> None:
    found = Hallusion().results(judge(Hallusion(), full_size, {}))
    percent = {name: round(100 * found[name], 4) for name in ("qAcc", "fAcc", "easy", "hard", "aAcc")}
    assert percent == {"qAcc": 3.956, "fAcc": 7.2254, "easy": 46.3736, "hard": 34.186, "aAcc": 42.8698}
    assert (found["n"], found["unparsed"]) == (1129, 0)


def test_figures_by_hand(tmp_path: Path) -> None:
    # VD: an original and an edited figure, two questions. VS: without a figure, then with an original one.
    entries = items("VD", "map", "12", ["10", "01"]) + items("VS", "chart", "01", ["1", "1"])
    answers = {"VD/map/0/0/1": "no", "VD/map/0/1/0": "Yes", "VS/chart/0/0/0": "I cannot tell."}
    found = Hallusion().results(judge(Hallusion(), load(tmp_path, entries), answers))
    assert found == {
        "aAcc": 5 / 6,  # the edited figure's first question is wrong; unclear is right without a figure
        "fAcc": 2 / 3,  # VD figure 0 and VS figure 1
        "qAcc": 2 / 3,  # VD question 1 and VS question 0
        "easy": 1.0,
        "hard": 0.5,
        "n": 6,
        "unparsed": 1,
    }


def test_unclear_is_wrong_with_a_figure(tmp_path: Path) -> None:
    entries = items("VS", "chart", "01", ["1", "0"]) + items("VD", "map", "1", ["1"])
    verdicts = judge(Hallusion(), load(tmp_path, entries), {}, default="Yes and no")
    assert [(verdict.right, verdict.parsed, verdict.note) for _, verdict in verdicts] == [
        (True, False, "unclear"),
        (False, False, "unclear"),
        (False, False, "unclear"),
    ]


def test_a_group_with_a_failed_answer_is_left_out(tmp_path: Path) -> None:
    workload = load(tmp_path, items("VD", "map", "12", ["11", "11"]))
    verdicts = judge(Hallusion(), workload, {})
    whole, part = Hallusion().tally(verdicts), Hallusion().tally(verdicts[:3])
    assert whole.sums()["fAcc groups"] == whole.sums()["qAcc groups"] == 2
    assert part.sums()["fAcc groups"] == part.sums()["qAcc groups"] == part.sums()["hard groups"] == 1
    assert part.sums()["easy groups"] == 2


def test_a_set_is_drawn_together(full_size: Workload) -> None:
    tally = Hallusion().tally(judge(Hallusion(), full_size, {}))
    assert len(tally.units) == sum(times for *_, times in SETS)
    draws = {name: np.stack([values.sum(), 2 * values[0]]) for name, values in tally.counts.items()}
    found = Hallusion().figures(draws)
    assert found["fAcc"].tolist() == [25 / 346, 0]
    assert found["yes_ratio"].tolist() == found["length"].tolist() == [1, 1]


def test_nothing_judged() -> None:
    assert Hallusion().results([]) == dict.fromkeys(("aAcc", "fAcc", "qAcc", "easy", "hard")) | {"n": 0, "unparsed": 0}


def test_what_is_asked(tmp_path: Path) -> None:
    samples = load(tmp_path, items("VS", "chart", "01", ["1", "0"])).samples
    assert [(s.id, s.image, s.prompt, s.target["label"], s.unit) for s in samples] == [
        ("VS/chart/0/0/0", None, "Is it 0?", "yes", "VS/chart/0"),
        ("VS/chart/0/1/0", "VS/chart/0_1.png", "Is it 0?", "no", "VS/chart/0"),
    ]


def test_judgements_made_before(tmp_path: Path) -> None:
    entries = items("VS", "chart", "01", ["1", "1"])
    said = ["It depends.", "Certainly. "]
    filled = [
        entry | {"model_prediction": text, "gpt4v_output_gpt_check": judgement}
        for entry, text, judgement in zip(entries, said, ("2", "1"), strict=True)
    ]
    (tmp_path / "judged.json").write_text(json.dumps(filled))
    plain = load(tmp_path, entries)
    workload = load(tmp_path, entries, judgements=[tmp_path / "judged.json"])
    assert workload.samples == judged_before(plain.samples, [tmp_path / "judged.json"])
    assert workload.about["judgements"][0]["file"] == "judged.json"
    task = Hallusion(judged_by="file")
    verdicts = [task.judge(sample, answer) for sample, answer in zip(workload.samples, said, strict=True)]
    assert [(verdict.right, verdict.note) for verdict in verdicts] == [(True, "unclear"), (True, "right")]
    other = task.judge(workload.samples[1], "Yes")  # a right answer, but nobody judged it
    assert (other.right, other.parsed, other.note) == (False, False, "unclear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set_id": "9"}, "no question of this run"),
        ({"gpt4v_output_gpt_check": "3"}, "judgement is '3'"),
        ({"model_prediction": None}, "of None"),
    ],
)
def test_bad_judgements(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    entries = items("VD", "map", "1", ["1"])
    filled = [entries[0] | {"model_prediction": "Yes", "gpt4v_output_gpt_check": "1"} | change]
    (tmp_path / "judged.json").write_text(json.dumps(filled))
    with pytest.raises(DataError, match=message):
        load(tmp_path, entries, judgements=[tmp_path / "judged.json"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "VX"}, "category is 'VX'"),
        ({"gt_answer": "yes"}, "gt_answer is 'yes'"),
        ({"visual_input": 3}, "visual_input is 3"),
        ({"question": ""}, "question is ''"),
    ],
)
def test_bad_items(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, [items("VD", "map", "1", ["1"])[0] | change])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        load(tmp_path, items("VD", "map", "1", ["1"]) * 2)
    with pytest.raises(DataError, match="no question"):
        load(tmp_path, [])
    with pytest.raises(DataError, match="line 1 has no set_id"):
        load(tmp_path, [{"category": "VD", "subcategory": "map", "figure_id": "0", "question_id": "0"}])


def test_the_judge_is_an_option() -> None:
    assert Hallusion(**Hallusion(judged_by="file").options()) == Hallusion(judged_by="file")
    with pytest.raises(UsageError, match="'gpt-4'"):
        Hallusion(judged_by="gpt-4")
