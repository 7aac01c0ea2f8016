"""Which decoder is recommended, and that what is said of the recipes stands in the files and in the documents."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_vlm
from vlmfix.advice import choice, published
from vlmfix.advice.costs import Cost, cost
from vlmfix.advice.recipes import ORDER, Figure, Measured, Recipe, recipes
from vlmfix.commands import options
from vlmfix.decoders import DECODERS, parse
from vlmfix.language.recipe import SHIPPED
from vlmfix.parsing import toml_of
from vlmfix.settings import EMBEDDED

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text()


def figure(change, clear=True):
    return Figure(plain=0.5, change=change, low=change - 0.01, high=change + 0.01, clear=clear)


def recipe(name, *, invented=-0.05, recall=0.0, f1=0.02, clear=True, rows=1, models=("tiny",)):
    figures = {"chair_i": figure(invented, clear), "recall": figure(recall), "f1": figure(f1)}
    time = {"alone": 1.1, "many": 4.5, "together": 8, "machine": "a machine"}
    measured = dict.fromkeys(models, Measured(figures))
    return Recipe(name, "vcd", "It does.", rows, "By hand.", {"scenes": 10, "seed": 1}, time, measured)


@pytest.fixture
def known(monkeypatch):
    found = [
        recipe("careful", f1=0.01),
        recipe("bold", recall=-0.05, f1=0.03, rows=10),
        recipe("idle", clear=False, f1=0.9),
    ]
    monkeypatch.setattr(choice, "recipes", lambda: found)
    return {one.name: one for one in found}


def against(advice):
    return {option.recipe.name: option.against for option in advice.options}


def test_the_best_of_those_that_help_is_taken(known):
    advice = choice.advise("tiny", {})
    assert (advice.decoder, advice.own) == ("@bold", True)
    assert against(advice) == {"careful": (), "bold": (), "idle": ("it was not measured to help tiny",)}


def test_recall_is_kept(known):
    advice = choice.advise("tiny", {}, keep_recall=True)
    assert advice.decoder == "@careful"
    assert against(advice)["bold"] == ("it loses more than 0.02 of recall on tiny",)


def test_a_budget_is_kept(known):
    advice = choice.advise("tiny", {}, budget=1.2)
    assert advice.decoder == "@careful"
    assert against(advice)["bold"] == ("a step may take 4.5 x as long as plain decoding's, more than 1.2 x",)
    assert choice.advise("tiny", {}, budget=1).decoder == "greedy"  # one row costs 1.05


def test_what_cannot_act_is_not_taken(known):
    advice = choice.advise("tiny", {"@bold": "no heads", "@careful": None})
    assert advice.decoder == "@careful"
    assert against(advice)["bold"] == ("it cannot act: no heads",)


def test_a_model_that_was_not_measured_is_said_to_be_one(known):
    assert not choice.advise("llava-hf/llava-1.5-7b-hf", {}).own
    assert not choice.advise(None, {}).own


def test_rows_of_the_table_cost_what_it_says_and_others_what_their_recipe_says():
    assert cost(recipe("one")).times == 1.05
    assert cost(recipe("two", rows=2)).times == 1.29
    for rows in (3, 10):
        assert cost(recipe("other", rows=rows)) == Cost(1.1, 4.5, 8, "a machine")


def test_published_figures_are_differences_within_a_source():
    found = published.published(["pai", "vhr"])
    assert [one.decoder for one in found] == ["pai"] * 6 + ["vhr"] * 2
    assert found[0].change == pytest.approx(22.8 - 46.4)
    assert {one.how for one in found} == {"copied", "second hand"}


def test_published_figures_say_of_how_long_answers_they_are_where_that_is_another_length():
    found = published.published(DECODERS)
    assert {one.tokens for one in found} == {64, 128, 512}
    (only,) = [one for one in found if one.decoder == "only"]
    assert (only.plain, only.mitigated, only.known_from) == (26.2, 20.0, "ONLY; up to 128 tokens; second hand")
    assert [(one.source, one.tokens) for one in found if one.decoder == "memvr"] == [("MemVR", 512), ("AIR", 64)]
    assert next(one for one in found if one.decoder == "deco").known_from == "DeCo; copied"


def test_every_name_among_the_published_figures_is_a_decoder():
    sources = toml_of(published.FILE.read_bytes())["sources"]
    assert {name for one in sources for name in one["methods"]} <= set(DECODERS.homes)
    assert len({one["source"] for one in sources}) == len(sources)


def test_recipes_are_those_that_are_shipped_and_their_rows_are_right():
    assert sorted(ORDER) == sorted(SHIPPED)
    for one in recipes():
        decoder = parse(f"@{one.name}")
        assert one.rows == decoder.passes
        assert list(one.models) == list(EMBEDDED)
        assert one.decoder in one.run["commands"][-1]


def test_what_the_page_says_is_what_the_files_say():
    for one in recipes():
        for model, measured in one.models.items():
            (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `@{one.name}` | `{model}` |"))
            for name in ("chair_i", "recall"):
                assert measured.figures[name].text() in row
            assert ("no clear help" in row) != measured.helps
        assert all(command in PAGE for command in one.run["commands"])
        assert one.decoder in PAGE


def test_the_front_page_says_what_the_files_say():
    front = (ROOT / "README.md").read_text()
    lines = {
        one.name: line for one in recipes() for line in front.splitlines() if line.startswith(f"| `@{one.name}` |")
    }
    kept, fewest, fast = recipes()
    shares = [
        1 + one.figures["chair_i"].change / one.figures["chair_i"].plain
        for recipe in (kept, fewest)
        for one in recipe.models.values()
    ]
    assert "({:.2f}, {:.2f} and {:.2f} of plain".format(*shares[:3]) in lines[kept.name]
    assert all(0.22 <= share < 0.34 for share in shares[3:])
    lost = sorted(round(-100 * one.figures["recall"].change) for one in fewest.models.values())
    assert f"{lost[0]} to {lost[-1]} of 100 objects" in lines[fewest.name]
    assert [one.helps for one in fast.models.values()] == [False, False, True]
    gone = round(-100 * fast.models["small"].figures["recall"].change)
    assert f"no clear effect on two models, and {gone} of 100 objects lost on the third" in lines[fast.name]
    few = round(-100 * kept.models["small"].figures["recall"].change)
    assert f"{few} of 100 on the third" in lines[kept.name]
    assert all(f"{one.run['scenes']} drawn scenes" in front for one in recipes())


def test_recommending_and_listing_need_no_torch():
    run = "import sys, vlmfix.cli as c; codes = [c._run([name]) for name in ('recommend', 'decoders')]"
    code = f"{run}; print(codes, {{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0] set()"
    assert done.stdout.startswith("Take --decoder @keep-recall\n")
    assert "Published by others, measured on LLaVA-1.5-7B, not here" in done.stdout
    assert "\n@fast " in done.stdout


def test_a_model_is_tried(tmp_path, vlmfix, monkeypatch):
    monkeypatch.setattr(options, "quieten", lambda: None)
    vlm = tiny_vlm("llava")
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    code, printed, told = vlmfix("recommend", "--model", tmp_path, "--budget", "1.2x", "--keep-recall", "--json")
    advice = json.loads(printed)
    assert (code, advice["model"], advice["measured_on_model"]) == (0, str(tmp_path), False)
    assert "3 of 3 recipes tried" in told
    assert not any("cannot act" in reason for option in advice["options"] for reason in option["against"])


@pytest.mark.parametrize("budget", ["0.5", "many", "1.2y", ""])
def test_a_budget_is_a_number_of_times(vlmfix, budget):
    code, _, told = vlmfix("recommend", "--budget", budget)
    assert code == 2
    assert f"{budget!r} is no number of times, such as 1.2x" in told
