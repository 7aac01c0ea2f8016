"""How well scores tell invented words from true ones, on words made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tools.study import doubt
from tools.study.doubt import Named, auroc, figures, table


def test_the_auroc_is_the_share_of_pairs_in_the_right_order():
    dice = np.random.default_rng(0)
    scores, invented = dice.integers(0, 5, 40).astype(float), dice.random(40) < 0.3
    pairs = [(one > other) + (one == other) / 2 for one in scores[invented] for other in scores[~invented]]
    assert auroc(scores, invented) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(scores, np.zeros(40)))


def word(picture, invented, value, flagged=False):
    scores = {"logprob": value, "entropy": -value, "sar": float(invented), "picture": 0.0}
    return Named(picture, invented, scores, flagged)


def test_figures_have_intervals_over_pictures_and_gains_over_the_probability():
    words = [
        word(picture, place == 0, 1.0 * ((picture + place) % 3), place == 0)
        for picture in range(9)
        for place in range(3)
    ]
    found = figures(words, draws=50)
    assert (found["words"], found["invented"], found["flagged"]) == (27, 9, {"words": 9, "invented": 9})
    sar, plain, entropy = (found["scores"][name] for name in ("sar", "logprob", "entropy"))
    assert (sar["auroc"], sar["interval"]) == (1.0, (1.0, 1.0))
    assert plain["auroc"] == pytest.approx(1 - entropy["auroc"])
    assert sar["gain"] == pytest.approx(1 - plain["auroc"])
    assert sar["gain_interval"][0] <= sar["gain"] <= sar["gain_interval"][1]
    text = table({"tiny": found})
    assert "| `tiny` | SAR | 1.000 [1.000, 1.000] | +" in text
    assert "9 of 27 object words are invented. Of the 9 that are flagged 9 are (100%), of the 18 others 0 (0%)" in text


def test_the_command_scores_captions_of_fresh_scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doubt, "DRAWS", 20)
    page = tmp_path / "page.md"
    arguments = ["--count", "2", "--model", "tiny", "--device", "cpu", "--page", str(page)]
    doubt.command.main(arguments, standalone_mode=False)
    text = page.read_text()
    assert "| `tiny` | -saliency of the picture |" in text
    assert capsys.readouterr().out.strip() in text
