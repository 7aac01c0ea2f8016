"""The main job with the model that comes with the package: scenes drawn, described, questioned."""

import pytest

from vlmfix.demo import demonstrate
from vlmfix.generation import load
from vlmfix.jobs.folder import Questions, run
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings
from vlmfix.world import coco
from vlmfix.world.mentions import mentions
from vlmfix.world.scenes import scene

SEED, COUNT = 987, 6


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    coco.make(folder, count=COUNT, seed=SEED)
    return folder / "images"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def described(scenes, out, vlm, *, batch_size, decoder="greedy"):
    settings = Settings(decoder=decoder, max_new_tokens=48)
    run(
        scenes,
        out,
        questions=Questions.text(),
        settings=settings,
        batch_size=batch_size,
        loader=lambda *_, **__: vlm,
    )
    return {record["image"]: record["answer"] for record in read_lines(out / "answers.jsonl")}


def test_a_folder_is_described(scenes, tmp_path, tiny):
    answers = described(scenes, tmp_path / "out", tiny, batch_size=4)
    assert list(answers) == [coco.image_name(number) for number in range(COUNT)]
    right = [
        len(set(mentions(text)) & set(scene(SEED, number).counts())) for number, text in enumerate(answers.values())
    ]
    assert sum(right) >= COUNT
    assert len(set(answers.values())) == COUNT
    card = read_json(tmp_path / "out" / "run.json")
    assert card["settings"]["weights"].startswith("sha256:")
    assert card["settings"]["commit"] is None
    assert card["finished"] is True


def test_answers_do_not_depend_on_the_batch(scenes, tmp_path, tiny):
    together = described(scenes, tmp_path / "together", tiny, batch_size=6, decoder="vcd")
    alone = described(scenes, tmp_path / "alone", tiny, batch_size=1, decoder="vcd")
    assert together == alone


def test_the_demonstration_shows_two_different_arms(tmp_path, tiny):
    shown = demonstrate(tmp_path, decoder="vcd", seed=SEED, count=3, loader=lambda model: tiny)
    plain, mitigated = shown.counts.values()
    assert 0 < plain.mentioned
    assert 0 < mitigated.mentioned
    assert any(s.answers["greedy"] != s.answers["vcd"] for s in shown.scenes)
    assert (tmp_path / "index.html").stat().st_size > 10_000
