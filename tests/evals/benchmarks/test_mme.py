"""MME's scores, and its two layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.mme import COGNITION, HALLUCINATION, PERCEPTION, Mme, read
from vlmfix.evals.task import Judged, Sample

TASK = Mme()


def judged(task: str, *pictures: tuple[str, ...]) -> list[Judged]:
    """Answers by picture to its two questions, of which the truth is yes, then no."""
    found = []
    for picture, answers in enumerate(pictures):
        for label, answer in zip(("yes", "no"), answers, strict=False):
            sample = Sample(
                id=f"{task}/{picture}/{label}",
                image=f"{task}/{picture}.jpg",
                prompt="?",
                target={"label": label},
                group=task,
                unit=f"{task}/{picture}",
            )
            found.append((sample, TASK.judge(sample, answer)))
    return found


def test_scores_by_hand() -> None:
    found = TASK.results(judged("count", ("Yes", "No"), ("Yes.", "Yes"), ("The answer is yes", "no\n"), ("No", "Nope")))
    assert found["count"] == {"acc": 5 / 8, "acc_plus": 1 / 4, "score": 62.5 + 25, "n": 8, "unparsed": 1}
    assert found["total"] == found["count"]
    assert list(found) == ["count", "total"]


def test_the_total_adds_scores_and_pools_questions() -> None:
    answers = [*judged("existence", ("Yes", "No")), *judged("color", ("Yes", "Yes"), ("No", "Yes"), ("Yes", "No"))]
    found = TASK.results(answers)
    assert found["existence"]["score"] == 200
    assert found["color"]["acc"] == 0.5
    assert found["color"]["acc_plus"] == 1 / 3
    assert found["total"]["score"] == found["existence"]["score"] + found["color"]["score"]
    assert found["total"]["acc"] == 5 / 8
    assert found["total"]["acc_plus"] == 0.5
    assert found["total"]["n"] == 8


def test_suites_are_added_up_when_they_are_complete() -> None:
    answers = [entry for task in (*PERCEPTION, *COGNITION) for entry in judged(task, ("Yes", "No"), ("No", "No"))]
    found = TASK.results(answers)
    assert found["total"]["score"] == 125 * len(HALLUCINATION)
    assert found["perception"]["score"] == 125 * len(PERCEPTION)
    assert found["cognition"]["score"] == 125 * len(COGNITION)
    incomplete = TASK.results(answers[4:])
    assert "perception" not in incomplete
    assert incomplete["total"]["n"] == 12


def test_a_pair_with_a_failed_answer_is_no_pair() -> None:
    found = TASK.results(judged("count", ("Yes", "No"), ("Yes",)))
    assert found["count"] == {"acc": 1.0, "acc_plus": 1.0, "score": 200.0, "n": 3, "unparsed": 0}
    alone = TASK.results(judged("count", ("Yes",)))
    assert alone["count"]["acc_plus"] is None
    assert alone["count"]["score"] is None


def test_pairs_are_drawn_together() -> None:
    tally = TASK.tally(judged("count", ("Yes", "No"), ("No", "No")))
    assert tally.units == ("count/0", "count/1")
    assert tally.counts["count/pairs"].tolist() == [1, 1]
    assert tally.counts["count/both"].tolist() == [1, 0]
    draws = {name: np.stack([2 * values[0], 2 * values[1]]) for name, values in tally.counts.items()}
    found = TASK.figures(draws)
    assert found["count/score"].tolist() == [200, 50]
    assert found["total/yes_ratio"].tolist() == [0.5, 0]
    assert found["count/length"].tolist() == [1, 1]


def test_nothing_judged() -> None:
    assert TASK.results([]) == {}


def folder_layout(root: Path) -> None:
    """Existence with everything in one folder, celebrity with folders of its own."""
    (root / "existence").mkdir()
    (root / "celebrity" / "images").mkdir(parents=True)
    (root / "celebrity" / "questions_answers_YN").mkdir()
    for text, picture in (
        ("existence/7.txt", "existence/7.jpg"),
        ("celebrity/questions_answers_YN/x.txt", "celebrity/images/x.png"),
    ):
        (root / text).write_text("Is there? Please answer yes or no.\tYes\nIs it? Please answer yes or no.\tNo\n\n")
        (root / picture).write_bytes(b"picture")


def test_the_layout_with_folders(tmp_path: Path) -> None:
    folder_layout(tmp_path)
    workload = read(tmp_path)
    assert workload.images == tmp_path
    assert [(s.id, s.image, s.target["label"], s.group, s.unit) for s in workload.samples] == [
        ("existence/7/1", "existence/7.jpg", "yes", "existence", "existence/7"),
        ("existence/7/2", "existence/7.jpg", "no", "existence", "existence/7"),
        ("celebrity/x/1", "celebrity/images/x.png", "yes", "celebrity", "celebrity/x"),
        ("celebrity/x/2", "celebrity/images/x.png", "no", "celebrity", "celebrity/x"),
    ]
    assert workload.samples[0].prompt == "Is there? Please answer yes or no."
    assert workload.about["tasks"]["existence"]["files"] == 1
    before = workload.about
    (tmp_path / "existence" / "7.txt").write_text("Is there?\tNo\nIs it?\tNo\n")
    assert read(tmp_path).about != before


def test_the_layout_of_result_files(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "count").mkdir(parents=True)
    (tmp_path / "pictures" / "count" / "a.jpg").write_bytes(b"picture")
    (tmp_path / "count.txt").write_text(
        "a.jpg\tTwo?\tYes\na.jpg\tThree?\tNo\tyes\nb.jpg\tOne?\tNo\nb.jpg\tFour?\tYes\n"
    )
    samples = read(tmp_path, tmp_path / "pictures").samples
    assert [(s.id, s.image, s.prompt, s.target["label"]) for s in samples] == [
        ("count/a.jpg/1", "count/a.jpg", "Two?", "yes"),
        ("count/a.jpg/2", "count/a.jpg", "Three?", "no"),
        ("count/b.jpg/1", "count/b.jpg", "One?", "no"),
        ("count/b.jpg/2", "count/b.jpg", "Four?", "yes"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\tTwo?\tYes\n", "count has 1 questions about a.jpg"),
        ("a.jpg\tTwo?\n", "line 1 has 2 parts"),
        ("a.jpg\tTwo?\tmaybe\n", "line 1: the truth is 'maybe'"),
        ("", "no task of MME"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "count.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task of MME"):
        read(tmp_path)
