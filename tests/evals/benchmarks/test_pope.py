"""POPE's official figures to the last digit, its question files, and the other parsers beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.coco import picture_objects
from vlmfix.evals.benchmarks.pope import KNOWN, SPLITS, SUFFIX, Pope, build, build_lines, read
from vlmfix.evals.benchmarks.yesno import PARSERS
from vlmfix.evals.task import Judged, Sample
from vlmfix.world.coco import make

IMAGES = Path("pictures")


def judged(task: Pope, answers: list[tuple[str, str, str]]) -> list[Judged]:
    """Samples of (split, label, answer), judged; two questions a picture."""
    samples = [
        Sample(id=f"{split}/{n}", image=f"{n // 2}.jpg", prompt="?", target={"label": label}, group=split)
        for n, (split, label, _) in enumerate(answers)
    ]
    return [(sample, task.judge(sample, answer)) for sample, (_, _, answer) in zip(samples, answers, strict=True)]


def confusion(split: str, tp: int, fp: int, tn: int, fn: int) -> list[tuple[str, str, str]]:
    return (
        [(split, "yes", "Yes")] * tp
        + [(split, "no", "Yes.")] * fp
        + [(split, "no", "No")] * tn
        + [(split, "yes", "No.")] * fn
    )


# TP FP TN FN, then accuracy, precision, recall, F1, yes-ratio as the official script prints them.
VECTORS = [
    ((890, 737, 763, 610), (0.551, 0.547019053472649, 0.5933333333333334, 0.5692356891589383, 0.5423333333333333)),
    ((890, 575, 925, 610), (0.605, 0.6075085324232082, 0.5933333333333334, 0.600337268128162, 0.48833333333333334)),
    (
        (890, 678, 822, 610),
        (0.5706666666666667, 0.5676020408163265, 0.5933333333333334, 0.5801825293350716, 0.5226666666666666),
    ),
]


@pytest.mark.parametrize(("cells", "expected"), VECTORS)
def test_official_figures_to_the_last_digit(cells: tuple[int, ...], expected: tuple[float, ...]) -> None:
    found = Pope().results(judged(Pope(), confusion("random", *cells)))["random"]
    assert tuple(found.values()) == (*expected, 3000, 0)
    assert list(found) == ["accuracy", "precision", "recall", "f1", "yes_ratio", "n", "unparsed"]


def test_published_answers_of_llava_13b_on_the_first_release() -> None:
    found = Pope().results(judged(Pope(), confusion("random", 1183, 31, 1379, 317)))["random"]
    assert found["n"] == 2910
    assert found["accuracy"] == 0.8804123711340206
    assert found["precision"] == 0.9744645799011532
    assert found["recall"] == 0.7886666666666666
    assert found["f1"] == 0.8717759764185703


def test_mean_f1_is_unweighted_and_pooled_f1_is_not_the_mean() -> None:
    answers = [
        entry
        for split, (cells, _) in zip(("random", "popular", "adversarial"), VECTORS, strict=True)
        for entry in confusion(split, *cells)
    ]
    found = Pope().figures(Pope().tally(judged(Pope(), answers)).sums())
    assert float(found["mean/f1"]) == pytest.approx(sum(expected[3] for _, expected in VECTORS) / 3, abs=1e-15)
    precision, recall = 2670 / (2670 + 737 + 575 + 678), 2670 / 4500
    assert float(found["pooled/f1"]) == 2 * precision * recall / (precision + recall)
    assert float(found["pooled/f1"]) != pytest.approx(float(found["mean/f1"]), abs=1e-6)


def test_the_mean_of_three_f1_as_llava_reports_it() -> None:
    # The first split is LLaVA-1.5-13B's; the other two have cells that give its published F1.
    thirds = {"random": (1183, 31, 1379, 317), "popular": (1183, 59, 1441, 317), "adversarial": (1183, 117, 1383, 317)}
    answers = [entry for split, cells in thirds.items() for entry in confusion(split, *cells)]
    found = Pope().figures(Pope().tally(judged(Pope(), answers)).sums())
    assert float(found["popular/f1"]) == pytest.approx(0.8628738147337709, abs=1e-15)
    assert float(found["adversarial/f1"]) == pytest.approx(0.8450000000000001, abs=1e-15)
    assert float(found["mean/f1"]) == pytest.approx(0.859883263717447, abs=1e-15)


def test_figures_of_many_draws_at_once() -> None:
    tally = Pope().tally(judged(Pope(), confusion("random", 3, 1, 4, 2)))
    assert len(tally.units) == 5
    draws = {name: np.stack([values.sum(), 2 * values.sum()]) for name, values in tally.counts.items()}
    found = Pope().figures(draws)
    assert found["random/f1"].shape == (2,)
    assert found["random/f1"][0] == found["random/f1"][1] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert found["random/length"].tolist() == [1, 1]


def test_a_run_without_yes_has_no_precision_and_does_not_crash() -> None:
    found = Pope().results(judged(Pope(), [("random", "yes", "No"), ("random", "no", "No")]))
    assert found["random"] | {} == {
        "accuracy": 0.5,
        "precision": None,
        "recall": 0.0,
        "f1": None,
        "yes_ratio": 0.0,
        "n": 2,
        "unparsed": 0,
    }
    assert Pope().results([]) == {}
    assert Pope().figures({}) == {}


def test_what_cannot_be_read_is_a_yes_and_is_counted() -> None:
    task = Pope()
    verdicts = judged(task, [("random", "no", ""), ("random", "no", "There is not."), ("random", "yes", "A dog")])
    assert [verdict.parsed for _, verdict in verdicts] == [False, False, False]
    assert [verdict.note for _, verdict in verdicts] == ["yes", "no", "yes"]
    assert [verdict.right for _, verdict in verdicts] == [False, True, True]
    assert task.results(verdicts)["random"]["unparsed"] == 3


def test_other_parsers_score_by_their_own_rules() -> None:
    answers = [("random", "yes", "Yes."), ("random", "no", "No."), ("random", "yes", "A dog"), ("random", "no", "No")]
    exact = Pope(parser="lmms-eval").results(judged(Pope(parser="lmms-eval"), answers))["random"]
    assert exact["accuracy"] == 0.25
    assert exact["recall"] is None  # nothing but a literal no is left
    assert exact["unparsed"] == 3
    unknown = Pope(parser="vlmevalkit").results(judged(Pope(parser="vlmevalkit"), answers))["random"]
    assert unknown["accuracy"] == 0.75
    assert unknown["recall"] == 0.5
    assert unknown["precision"] == 1


def test_details_compare_the_parsers() -> None:
    answers = [
        ("random", "yes", "Yes"),
        ("random", "no", "No."),
        ("random", "no", "NO"),
        ("popular", "no", "There isn't a dog."),
        ("popular", "yes", "Yes, I know it is there"),
    ]
    verdicts = judged(Pope(), answers)
    found = Pope().details(verdicts, [answer for _, _, answer in answers])
    assert set(found["parsers"]) == set(PARSERS)
    disagree = {name: entry["disagree"] for name, entry in found["parsers"].items()}
    assert disagree["official"] == 0
    assert disagree["opera"] == 2
    assert disagree["lmms-eval"] == 4
    assert disagree["vcd"] == 3
    assert found["any_disagree"] == 4
    assert found["length"] == pytest.approx((1 + 1 + 1 + 4 + 6) / 5)
    assert found["parsers"]["official"]["splits"] == Pope().results(verdicts)
    assert found["parsers"]["opera"]["splits"]["random"]["accuracy"] == 1
    assert found["mean_f1"] == found["parsers"]["official"]["mean_f1"]
    json.dumps(found, allow_nan=False)


def test_the_parser_is_an_option() -> None:
    assert Pope(**Pope(parser="opera").options()) == Pope(parser="opera")
    with pytest.raises(UsageError, match="'gpt'"):
        Pope(parser="gpt")


def line(number: int, image: str = "a.jpg", text: str = "Is there a dog in the image?", label: str = "yes") -> str:
    return json.dumps({"question_id": number, "image": image, "text": text, "label": label})


def test_a_folder_of_json_lines(tmp_path: Path) -> None:
    for split in ("adversarial", "random", "popular"):
        (tmp_path / f"coco_pope_{split}.json").write_text(f"{line(1)}\n{line(2, label='no')}\n")
    (tmp_path / "notes.txt").write_text("not a question")
    workload = read(tmp_path, IMAGES)
    assert [sample.id for sample in workload.samples] == [
        f"{split}/{number}" for split in ("random", "popular", "adversarial") for number in (1, 2)
    ]
    first = workload.samples[0]
    assert first.prompt == "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    assert (first.image, first.group, first.target, first.drawn_as()) == ("a.jpg", "random", {"label": "yes"}, "a.jpg")
    assert workload.images == IMAGES
    assert workload.about["suffix"] == SUFFIX
    assert workload.about["questions"]["random"]["generation"] is None


@pytest.mark.parametrize("indent", [None, 4])
def test_an_array_is_read_like_lines(tmp_path: Path, indent: int | None) -> None:
    entries = [json.loads(line(1)), json.loads(line(2, text="Is there an apple in the imange?", label="no"))]
    (tmp_path / "gqa_pope_seem_popular.json").write_text(json.dumps(entries, indent=indent))
    samples = read(tmp_path / "gqa_pope_seem_popular.json", IMAGES, suffix="").samples
    assert [(sample.id, sample.prompt) for sample in samples] == [
        ("popular/1", "Is there a dog in the image?"),
        ("popular/2", "Is there an apple in the imange?"),
    ]


def test_the_second_pope_is_read_too(tmp_path: Path) -> None:
    entries = [
        {
            "image_id": 7,
            "image_name": "/images/7.jpg",
            "target_object": "cup",
            "query": "Is there a cup?",
            "label": "No",
        },
        {
            "image_id": 7,
            "image_name": "/coco/7.jpg",
            "target_object": "cup",
            "query": "Is there a cup?",
            "label": "Yes",
        },
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(entries, indent=4))
    samples = read(tmp_path / "annotations.json", IMAGES).samples
    assert [(s.id, s.image, s.target["label"]) for s in samples] == [
        ("annotations/1", "images/7.jpg", "no"),
        ("annotations/2", "coco/7.jpg", "yes"),
    ]


def test_the_file_is_known_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "random.json"
    path.write_bytes(b"\xef\xbb\xbf" + line(1).encode())  # a byte-order mark, no line end
    found = read(path, IMAGES).about["questions"]["random"]
    assert found["file"] == "random.json"
    assert len(found["md5"]) == 32
    assert len(found["sha256"]) == 64
    monkeypatch.setattr("vlmfix.evals.benchmarks.pope.KNOWN", {found["md5"]: "the one"})
    assert read(path, IMAGES).about["questions"]["random"]["generation"] == "the one"


def test_the_published_files_of_every_edition_are_known() -> None:
    """Editions as published in November 2026, with the splits of each."""
    named = {}
    for md5, name in KNOWN.items():
        assert re.fullmatch(r"[0-9a-f]{32}", md5)
        named.setdefault(name.partition(" (")[0], []).append(md5)
    assert all(len(found) == 1 for found in named.values()), "no two files have one name"
    for data in ("A-OKVQA", "GQA"):
        for split in SPLITS:
            assert {f"{data} {split}, by POPE's authors", f"{data} {split}, as shipped with VCD"} <= named.keys()
    assert {"POPEv2", *(f"RePOPE, COCO {split}" for split in SPLITS)} <= named.keys()
    assert KNOWN["9736a20ddbcee1f3f3ce5d0226586038"].startswith("RePOPE, COCO random")
    assert KNOWN["e588f193fdf52eec4b52c3b927747208"].startswith("POPEv2")


@pytest.mark.parametrize("label", ["Yes", "YES", " yes\n", "No"])
def test_labels_may_be_capitalised(tmp_path: Path, label: str) -> None:
    (tmp_path / "pope.json").write_text(line(1, label=label))
    (sample,) = read(tmp_path / "pope.json", IMAGES).samples
    assert sample.target == {"label": label.strip().lower()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{line(1)}\n{{}}\n", r"line 2 has no image, text, label, question_id"),
        (f"{line(1)}\n[1]\n", "line 2: a list is not a JSON object"),
        (f"{line(1)}\n{line(2)[:-9]}", "line 2 is not JSON"),
        (f"[{line(1)},\n{line(2)}", "line 2 is not JSON"),
        (f"[\n{line(1)},\n{{\n}}]", "line 3 has no image"),
        (f"{line(1)}\n\n{line(1)}\n", "line 3 repeats the question_id 1"),
        (f"{line(1)}\n{line(2, label='maybe')}", "line 2: the label is 'maybe'"),
        (line(1, image=""), "line 1: image is ''"),
        ("question,label\n", "line 1 is not JSON"),
        ("", "has no question"),
        ("[]", "has no question"),
        ("[" * 100_000, "nests too deeply"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "popular.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "popular.json", IMAGES)


def test_files_that_cannot_be_told_apart_or_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        read(tmp_path / "nothing", IMAGES)
    with pytest.raises(DataError, match="no file in"):
        read(tmp_path, IMAGES)
    (tmp_path / "popular.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path, IMAGES)
    (tmp_path / "popular.json").write_text(line(1))
    (tmp_path / "gqa_popular.json").write_text(line(1))
    with pytest.raises(DataError, match="both the split popular"):
        read(tmp_path, IMAGES)


PICTURES = [(f"{n}.jpg", ["cup", "fork", "knife"]) for n in range(3)] + [
    ("3.jpg", ["apple", "dog", "cup", "fork"]),
    ("4.jpg", ["bus", "car"]),
]


def test_questions_are_built_by_the_official_rule() -> None:
    workload = build(iter(PICTURES), IMAGES, seed=3, suffix="")
    by_split = {
        split: [s for s in workload.samples if s.group == split] for split in ("random", "popular", "adversarial")
    }
    assert {split: len(samples) for split, samples in by_split.items()} == dict.fromkeys(by_split, 24)
    popular = [sample.prompt for sample in by_split["popular"] if sample.image == "3.jpg"]
    assert popular[0] == "Is there an apple in the image?"
    assert popular[1] == "Is there a knife in the image?"  # the most frequent one that is not there
    assert {sample.image for sample in workload.samples} == {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}
    again = build(iter(PICTURES), IMAGES, seed=3, suffix="")
    assert again.samples == workload.samples
    assert again.about == workload.about
    assert build(iter(PICTURES), IMAGES, seed=4).about != workload.about


def test_built_lines_are_an_official_file(tmp_path: Path) -> None:
    for split, text in build_lines(PICTURES, seed=3).items():
        (tmp_path / f"{split}.json").write_text(text)
    assert read(tmp_path, IMAGES).samples == build(PICTURES, IMAGES, seed=3).samples


def test_pictures_with_fewer_objects_cannot_be_asked_about() -> None:
    with pytest.raises(DataError, match="3 objects"):
        build(PICTURES[4:], IMAGES, seed=0)


def test_an_exported_world_is_read_and_built_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world = tmp_path / "world"
    make(world, count=6, seed=11)
    workload = read(world / "pope", world / "images")
    assert {sample.group for sample in workload.samples} == {"random", "popular", "adversarial"}
    assert all((world / "images" / str(sample.image)).exists() for sample in workload.samples)
    built = build(picture_objects(world / "annotations" / "instances.json"), world / "images", seed=11)
    assert built.samples == workload.samples  # the world asks by the same rule
