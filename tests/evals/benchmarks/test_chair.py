"""CHAIR's counts, figures and lists of pictures, worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.chair import PROTOCOLS, Chair, read
from vlmfix.evals.task import Sample
from vlmfix.world.coco import make

TABLE = "person, man\ndog, puppy\ncat\nbus\nchair, seat\ntoilet\ntraffic light\ndining table, table"


def sample(name: str, objects: list[str], *captions: str) -> Sample:
    return Sample(id=name, image=f"{name}.jpg", prompt="?", target={"objects": objects, "captions": list(captions)})


PARK = sample("park", ["person", "dog"], "A man walks.", "Two buses pass a traffic light.")
ROOM = sample("room", ["cat"], "It sleeps on a table.")
ANSWERS = [
    "A man and his puppy. Another dog sits by a cat and a chair.",  # person dog dog CAT CHAIR of person dog bus light
    "Nothing to see here.",
]


def judged(task: Chair, samples: list[Sample], answers: list[str]) -> list[Any]:
    return list(zip(samples, task.judge_all(samples, answers), strict=True))


def test_counts_by_hand() -> None:
    verdict = Chair(synonyms=TABLE).judge(PARK, ANSWERS[0])
    assert verdict.counts == {
        "captions": 1,
        "hallucinated_captions": 1,
        "mentions": 5,
        "hallucinated": 2,
        "distinct": 4,
        "found": 2,
        "present": 4,
        "tokens": 16,
    }
    assert (verdict.right, verdict.note) == (False, "cat, chair")


def test_figures_are_pooled_over_captions() -> None:
    task = Chair(synonyms=TABLE)
    found = task.results(judged(task, [PARK, ROOM], ANSWERS))
    assert list(found) == ["chair_s", "chair_i", "recall", "precision", "f1", "length", "n"]
    recall, precision = 2 / 6, 2 / 4
    assert found == pytest.approx(
        {
            "chair_s": 1 / 2,
            "chair_i": 2 / 5,
            "recall": recall,
            "precision": precision,
            "f1": 2 * recall * precision / (recall + precision),
            "length": (16 + 5) / 2,
            "n": 2,
        }
    )


def test_figures_of_many_draws_at_once() -> None:
    task = Chair(synonyms=TABLE)
    tally = task.tally(judged(task, [PARK, ROOM], ANSWERS))
    drawn = {name: np.stack([values.sum(), 2 * values[1]]) for name, values in tally.counts.items()}
    found = task.figures(drawn)
    assert found["chair_s"].tolist() == [0.5, 0.0]
    assert found["recall"][1] == 0
    assert np.isnan(found["chair_i"][1])
    assert np.isnan(found["f1"][1])


def test_ground_truth_is_read_by_the_rules_of_the_answer() -> None:
    assert Chair(synonyms=TABLE).truth(PARK) == {"person", "dog", "bus", "traffic light"}
    lone = sample("x", [], "A bus.")
    assert Chair(synonyms=TABLE).truth(lone) == set()  # the pattern version does not know a lone bus
    assert Chair().truth(lone) == {"bus"}


def test_the_toilets_seat_is_no_chair() -> None:
    verdict = Chair(synonyms=TABLE).judge(sample("x", ["toilet"]), "The seat of the toilet is up.")
    assert (verdict.right, verdict.counts["mentions"]) == (True, 1)


def test_trimming_leaves_the_last_incomplete_sentence_out() -> None:
    text = "A man walks. A cat and a"
    for trim, right in ((False, False), (True, True)):
        assert Chair(synonyms=TABLE, trim=trim).judge(PARK, text).right is right
    assert Chair(synonyms=TABLE, trim=True).judge(PARK, "A cat and a").right is False
    protocol = PROTOCOLS["chair-64-trim"]
    assert (protocol.max_new_tokens, protocol.trim) == (64, True)
    assert (PROTOCOLS["chair-512"].max_new_tokens, PROTOCOLS["chair-512"].trim) == (512, False)


def test_nothing_mentioned_at_all_is_an_error() -> None:
    task = Chair(synonyms=TABLE)
    with pytest.raises(DataError, match="none of 2 captions names an object"):
        task.results(judged(task, [PARK, ROOM], ["", "Das ist ein Hund."]))
    assert task.results([])["n"] == 0


def test_details_say_where_and_what() -> None:
    task = Chair(synonyms=TABLE)
    answers = [*ANSWERS, "A cat. A cat. A man. A dog. A dog."]
    found = task.details(judged(task, [PARK, ROOM, ROOM], answers), answers)
    # park: man puppy dog CAT CHAIR; room: cat cat MAN DOG DOG
    assert [(row["quarter"], row["mentions"], row["hallucinated"]) for row in found["by_quarter"]] == [
        (1, 4, 0),
        (2, 2, 1),
        (3, 2, 2),
        (4, 2, 2),
    ]
    assert [(row["sentence"], row["mentions"], row["hallucinated"]) for row in found["by_sentence"]] == [
        (1, 3, 0),
        (2, 4, 2),
        (3, 1, 1),
        (4, 1, 1),
        (5, 1, 1),
    ]
    assert found["by_quarter"][1]["share"] == 0.5
    assert found["hallucinated_words"] == [
        {"word": "dog", "count": 2},
        {"word": "person", "count": 1},
        {"word": "cat", "count": 1},
        {"word": "chair", "count": 1},
    ]
    assert found["captions_without_mention"] == 1
    assert found["mentions_per_caption"] == 10 / 3
    assert found["words_per_caption"] == (14 + 4 + 10) / 3


def test_mentions_can_be_marked_in_the_answer() -> None:
    found = Chair(synonyms=TABLE).mentions(PARK, ANSWERS[0])
    marked = [(ANSWERS[0][mention.start : mention.end], absent) for mention, absent in found]
    assert marked == [("man", False), ("puppy", False), ("dog", False), ("cat", True), ("chair", True)]


def test_options_make_an_equal_task() -> None:
    task = Chair(synonyms=TABLE, trim=True)
    assert Chair(**json.loads(json.dumps(task.options()))) == task


def test_a_category_that_the_table_lacks() -> None:
    with pytest.raises(DataError, match="does not know the categories zebra"):
        Chair(synonyms=TABLE).judge(sample("x", ["zebra"]), "A dog.")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    make(folder, count=8, seed=3)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def inputs(world: Path) -> tuple[Path, Path, Path]:
    return world / "annotations" / "instances.json", world / "annotations" / "captions.json", world / "images"


def test_an_exported_world(world: Path) -> None:
    found = read(*inputs(world))
    assert [entry.id for entry in found.samples] == [str(number) for number in range(8)]
    assert {entry.prompt for entry in found.samples} == {"Please describe this image in detail."}
    assert all((world / "images" / str(entry.image)).is_file() for entry in found.samples)
    assert found.about["protocol"] == "chair-512"
    assert json.loads(json.dumps(found.about)) == found.about
    assert json.loads(json.dumps([asdict(entry) for entry in found.samples]))[0]["target"] == found.samples[0].target
    # its own references hallucinate nothing
    task = Chair()
    answers = [entry.target["captions"][0] for entry in found.samples]
    scores = task.results(judged(task, list(found.samples), answers))
    assert (scores["chair_s"], scores["chair_i"], scores["precision"]) == (0, 0, 1)


def test_draws_are_parts_of_larger_draws(world: Path) -> None:
    five = [entry.id for entry in read(*inputs(world), count=5, seed=1).samples]
    assert five == [entry.id for entry in read(*inputs(world), count=5, seed=1).samples] == sorted(five)
    assert {entry.id for entry in read(*inputs(world), count=3, seed=1).samples} < set(five)
    assert five != [entry.id for entry in read(*inputs(world), count=5, seed=2).samples]
    with pytest.raises(DataError, match="9 pictures were asked for, 8 are annotated"):
        read(*inputs(world), count=9)


def test_lists_of_names_and_ids(world: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("5\n\n000000000002.png\n 000000000007 \n")
    found = read(*inputs(world), listed=listed, prompt="Describe.")
    assert [entry.id for entry in found.samples] == ["5", "2", "7"]
    assert {entry.prompt for entry in found.samples} == {"Describe."}
    assert len(found.about["list"]["sha256"]) == 64
    listed.write_text("5\n8\nx.png\n")
    with pytest.raises(DataError, match=r"2 of 3 pictures in .* are not in the annotations: 8, x\.png"):
        read(*inputs(world), listed=listed)
    listed.write_text("5\n000000000005.png\n")
    with pytest.raises(DataError, match="lists 1 pictures more than once: 5"):
        read(*inputs(world), listed=listed)
    listed.write_text(" \n")
    with pytest.raises(DataError, match="lists no picture"):
        read(*inputs(world), listed=listed)


def test_bad_data_is_found_before_the_model(world: Path, tmp_path: Path) -> None:
    instances, captions, images = inputs(world)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"8 of 8 pictures .*: 000000000000.png, .*04.png and 3 more"):
        read(instances, captions, tmp_path / "empty")
    with pytest.raises(DataError, match="there is no folder"):
        read(instances, captions, tmp_path / "none")
    silent = json.loads(captions.read_text())
    silent["annotations"] = [entry for entry in silent["annotations"] if entry["image_id"] != 6]
    (tmp_path / "silent.json").write_text(json.dumps(silent))
    with pytest.raises(DataError, match=r"1 of 8 pictures have no reference caption in .*: 6"):
        read(instances, tmp_path / "silent.json", images)
    with pytest.raises(DataError, match=r"instances\.json: .* does not know the categories"):
        read(instances, captions, images, synonyms="dog, pup")
    with pytest.raises(UsageError, match="no CHAIR protocol is called 'chair-65'"):
        read(instances, captions, images, protocol="chair-65")
    with pytest.raises(UsageError, match="count=0"):
        read(instances, captions, images, count=0)
    with pytest.raises(UsageError, match="count=2"):
        read(instances, captions, images, count=2, listed=captions)
