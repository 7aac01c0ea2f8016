"""HeadHunter: heads are chosen one by one, within the guards, and a hunt goes on where it was."""

from __future__ import annotations

import pytest

from tests.evals.tuning.test_tune import WORK, Counted, Fake
from vlmfix.decoders import Amplify, parse
from vlmfix.errors import UsageError
from vlmfix.evals.record import PLAIN
from vlmfix.evals.tuning.hunt import Hunted, hunt
from vlmfix.evals.tuning.tune import Guards
from vlmfix.language.recipe import read_recipe
from vlmfix.settings import Settings

WORTH = {(0, 1): 0.2, (0, 2): -0.4, (1, 3): 0.9, (2, 0): 0.5}
"""Hallucinated mentions that each head takes away; the effects add up."""


def additive(decoder, sample):
    heads = decoder.heads.pairs if isinstance(decoder, Amplify) else ()
    wrong = 3.0 - sum(WORTH[head] for head in heads)
    return {"wrong": wrong, "named": 20.0, "found": 0.3 if (1, 3) in heads else 0.6, "words": 50.0}


def harmless(decoder, sample):
    return additive(decoder, sample) | {"found": 0.6}


def go(out, evaluate, *, spec="amplify:by=0", heads=4, candidates=tuple(WORTH)):
    how = {"ranking": {"profile": "made up"}, "out": out, "seed": 0, "guards": Guards()}
    return hunt(spec, WORK, Counted(), Settings(), heads=heads, candidates=candidates, evaluate=evaluate, **how)


def heads_of(found):
    return [str(trial.parameters["heads"]) for trial in found.trials]


def test_effects_that_add_up_give_the_best_heads_in_order(tmp_path):
    evaluate = Fake(harmless)
    found = go(tmp_path / "out", evaluate)
    assert found.chosen.spec.startswith("amplify:heads=L1H3/L2H0/L0H1,by=0.0,")
    assert heads_of(found)[:5] == ["L0H1", "L0H2", "L1H3", "L2H0", "L1H3/L0H1"]
    assert len(found.trials) == 4 + 3 + 2 + 1  # the last round makes nothing better
    recipe = read_recipe(found.recipe)
    assert parse(f"@{found.recipe}").heads.pairs == ((1, 3), (2, 0), (0, 1))
    assert recipe["search"]["tuned"] == ["heads"]
    assert evaluate.images["tuning"] & evaluate.images["held-out"] == set()
    assert "chair_i changes by -0.08" in found.verdict


def test_a_head_that_costs_recall_is_passed_over(tmp_path):
    found = go(tmp_path / "out", Fake(additive))
    assert str(found.chosen.parameters["heads"]) == "L2H0/L0H1"
    assert all("L1H3" not in spec for trial, spec in zip(found.trials, heads_of(found), strict=True) if trial.feasible)


def test_where_no_head_helps_plain_decoding_is_best(tmp_path):
    found = go(tmp_path / "out", Fake(harmless), candidates=[(0, 2)])
    assert (found.chosen, found.recipe, len(found.trials)) == (None, None, 1)


def test_fewer_rounds_are_the_beginning_of_more(tmp_path):
    first = go(tmp_path / "out", Fake(harmless), heads=1)
    assert str(first.chosen.parameters["heads"]) == "L1H3"
    more = go(tmp_path / "out", Fake(harmless), heads=2)
    assert heads_of(more)[:4] == heads_of(first)
    assert str(more.chosen.parameters["heads"]) == "L1H3/L2H0"
    (tmp_path / "out" / "tuning").mkdir()
    (tmp_path / "out" / "tuning" / "card.json").write_text("{}")  # as an evaluation that has begun leaves it
    with pytest.raises(UsageError, match="candidates was 'L0H1/L0H2/L1H3/L2H0'"):
        go(tmp_path / "out", Fake(harmless), candidates=[(1, 3)])


def test_the_decoder_of_a_chain_that_leaves_heads_open_gets_them():
    built = Hunted.of("vcd:contrast=0.5+ph3").build([(1, 2), (0, 3)])
    assert "ph3:group=memory,share=0.05,heads=L1H2/L0H3" in built.spec()
    assert "vcd:preset=" in built.spec()
    for spec in ("vcd", "ph3:heads=L0H1", "ph3+amplify"):
        with pytest.raises(UsageError, match="decoders whose heads are open"):
            Hunted.of(spec)


def test_plain_decoding_runs_once_with_every_arm(tmp_path):
    evaluate = Fake(harmless)
    go(tmp_path / "out", evaluate, heads=1)
    assert all(PLAIN in arms for _, arms in evaluate.calls)
