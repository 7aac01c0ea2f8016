"""The measures, on answers whose scores are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from tools.study.embedded import caption_figures, command, draw, measure, pope_figures, spelled
from vlmfix.world.captions import references
from vlmfix.world.mentions import mentions
from vlmfix.world.scenes import scene

SHOWN = draw(6, 31, "cpu")


def always(text: str):
    def answer(pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> list[str]:
        assert len(pictures) == len(prompts)
        return [text] * len(prompts)

    return answer


def test_captions_that_are_true_have_no_hallucination() -> None:
    views = [scene(31, index) for index in range(6)]
    found = caption_figures(views, [references(view)[0] for view in views])
    assert found["chair_s"] == found["chair_i"] == 0
    assert found["recall"] == 1


def test_hallucinated_mentions_are_counted_where_they_stand() -> None:
    views = [view for view in (scene(31, index) for index in range(40)) if "giraffe" not in view.counts()][:2]
    name = next(iter(views[0].counts()))
    texts = [f"There is a {name} and a {name}. There is a giraffe.", "Nothing is here."]
    assert mentions(texts[0]) == [name, name, "giraffe"]
    found = caption_figures(views, texts)
    assert found["chair_s"] == 0.5
    assert found["chair_i"] == pytest.approx(1 / 3)
    assert found["by sentence"] == [0, 1]
    assert found["recall"] == pytest.approx(1 / sum(len(view.counts()) for view in views))


def test_pope_of_a_yes_sayer_is_at_chance() -> None:
    for figures in (pope_figures(always("Yes."), SHOWN), pope_figures(always("Yes."), SHOWN, blind=True)):
        assert set(figures) == {"random", "popular", "adversarial"}
        for split in figures.values():
            assert split["accuracy"] == 0.5
            assert split["yes_ratio"] == 1


def test_measure_runs_everything() -> None:
    found = measure(always("No, there are two people in the middle."), SHOWN)
    assert found["pope"]["random"]["yes_ratio"] == 0
    assert found["small objects"]["one picture"]["recall"] == 0
    assert 0 <= found["counting"]["several"] <= 1
    assert 0 <= found["position"]["place"] <= 1


@pytest.mark.parametrize(("text", "number"), [("There are three.", 3), ("12", 12), ("No cups.", 0), ("cups", None)])
def test_spelled(text: str, number: int | None) -> None:
    assert spelled(text) == number


def test_the_command_measures_the_embedded_model(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command(["--scenes", "3", "--seed", "77", "--device", "cpu", "--json", str(file)], standalone_mode=False)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["decoders"]["greedy"]["captions"]["recall"] > 0.5
    assert found["pope without the picture"]["random"]["accuracy"] == 0.5
    layers = len(found["looking"]["first token"])
    mass = [sum(found["looking"]["mass"][name][layer] for name in found["looking"]["mass"]) for layer in range(layers)]
    assert mass == pytest.approx([1] * layers, abs=1e-3)
