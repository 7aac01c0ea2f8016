"""Every decoder runs over a folder on an embedded model, each kind on both, and on random models of six families."""

from __future__ import annotations

import pytest

from tests.contracts.support import PICTURES, crossed, vlm_of
from tests.embedded import TINY
from vlmfix.decoders import DECODERS
from vlmfix.generation import load
from vlmfix.jobs.folder import Questions, run
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
Given = {
    "var": "sink_dims=1/2/3/4,sink_threshold=0.8,min_visual_mass=0,min_nonsink_ratio=0,layers=2:",
    "act": "heads=all,layers=all",
    "adhh": "heads=L0H3/L1H1/L2H7,threshold=0.2",
    "ph3": "heads=L0H2/L1H6",
    "amplify": "heads=L0H2/L1H6",
    "imbalance": "significance=received,layers=all",
}
"""What a model without sinks, published heads, profiles or a class token must be told."""
KNOWN = {"adhh": TINY, "ph3": TINY, "amplify": TINY, "imbalance": ("tiny",)}
"""Where that is known."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate((PICTURES[0][0], *PICTURES[1])):
        picture.save(path / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def embedded():
    return {name: load(name, device="cpu") for name in TINY}


def spec(name, model):
    told = "" if model in KNOWN.get(name, ()) else Given.get(name, "")
    return f"{name}:{told}" if told else name


SPECS = {name: spec(name, "llava") for name in DECODERS}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *crossed(SPECS, families=list(TINY), pair=list(TINY), turn=0),
        *crossed(SPECS, families=FAMILIES, pair=(), turn=0),
    ],
)
def test_it_answers_about_every_picture(folder, embedded, tmp_path, name, model):
    vlm = embedded[model] if model in TINY else vlm_of(model)
    done = run(
        folder,
        tmp_path / "out",
        questions=Questions.text("Is there a dog in the image?"),
        settings=Settings(decoder=spec(name, model), max_new_tokens=3, seed=5),
        batch_size=2,
        loader=lambda *_, **__: vlm,
    )
    assert (done.totals.answers, done.totals.failed) == (3, 0)
    assert [record["image"] for record in read_lines(tmp_path / "out" / "answers.jsonl")] == ["0.png", "1.png", "2.png"]
    assert read_json(tmp_path / "out" / "run.json")["settings"]["decoder"].startswith(name)
