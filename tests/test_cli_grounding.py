"""`vlmfix grounding` on a drawn scene: the same scores as the function's, as a table, as JSON and as a picture."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import vlmfix as package
from tests.embedded import TINY
from vlmfix.insight.grounding import grounding
from vlmfix.world import coco

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    coco.make(folder, count=1, seed=43)
    return next((folder / "images").iterdir())


@pytest.mark.parametrize("model", TINY)
def test_a_given_answer_is_judged_as_the_function_judges_it(picture, vlmfix, model, tmp_path):
    plot = tmp_path / "scores.png"
    asked = ("grounding", picture, QUESTION, "--model", model, "--answer", "There is a dog.", "--layers", "1:")
    code, printed, said = vlmfix(*asked, "--json", "--plot", plot)
    assert code == 0
    found = json.loads(printed)
    vlm = package.load(model, device="cpu")
    (want,) = grounding(vlm, [Image.open(picture).convert("RGB")], QUESTION, ["There is a dog."], layers="1:")
    assert [row["text"] for row in found["tokens"]] == list(want.texts)
    for name in ("picture", "prompt", "earlier", "preceding"):
        assert [row[name] for row in found["tokens"]][1:] == pytest.approx(getattr(want, name)[1:].tolist(), abs=1e-6)
    assert found["tokens"][0]["preceding"] is None
    assert found["mean"]["picture"] == pytest.approx(float(want.picture.mean()), abs=1e-6)
    dropped = json.loads(vlmfix(*asked, "--json", "--drop-sinks")[1])
    (noun,) = (place for place, text in enumerate(want.texts) if text.strip() == "dog")
    assert dropped["mean"]["prompt"] == pytest.approx(float(want.prompt[noun]), abs=1e-6)
    assert f"drawn in {plot}" in said
    with Image.open(plot) as drawn:
        assert drawn.width > 600


def test_without_an_answer_the_models_own_is_judged(picture, vlmfix):
    code, printed, _ = vlmfix("grounding", picture, QUESTION, "--max-new-tokens", 4)
    said = package.load("tiny", device="cpu").generate([Image.open(picture)], QUESTION, max_new_tokens=4)[0]
    assert code == 0
    lines = printed.splitlines()
    assert lines[0] == said.text
    assert len(lines) == 3 + said.tokens  # the answer, the head of the table, a line per token, the mean
    assert lines[1].split() == ["token", "picture", "prompt", "earlier", "preceding"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nothing.png", QUESTION), "there is no file nothing.png"),
        (("PICTURE", " "), "is empty"),
        (("PICTURE", QUESTION, "--answer", ""), "is empty"),
        (("PICTURE", QUESTION, "--decoder", "beam", "--temperature", "1"), "temperature=1.0 is asked for"),
        (("PICTURE", QUESTION, "--layers", "x"), "layers 'x' are not understood"),
        (("PICTURE", QUESTION, "--plot", "no/such/place.png"), "there is no folder no/such"),
    ],
)
def test_wrong_use_is_told_before_the_model_loads(picture, vlmfix, arguments, reason):
    code, _, said = vlmfix("grounding", *(picture if part == "PICTURE" else part for part in arguments))
    assert code == 2
    assert reason in said
    assert "loading" not in said
