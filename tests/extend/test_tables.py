"""Entry points of other distributions: listed by their metadata alone, imported when asked for, refused by name."""

from __future__ import annotations

import json
import re
import sys
import textwrap

import pytest

from tests.extend.installed import install
from vlmfix.decoders import DECODERS, parse
from vlmfix.errors import PluginError, UnsupportedModelError, UsageError
from vlmfix.evals.tasks import TASKS
from vlmfix.heads.profilers import PROFILERS, profilers_of
from vlmfix.models.families import FAMILIES, families, family_of
from vlmfix.plugins import origin_of

MINE = textwrap.dedent('''
    from dataclasses import dataclass
    from typing import ClassVar
    from vlmfix.extend import Decoder, DecodingPlan, Source, parameter

    @dataclass(frozen=True, kw_only=True)
    class Mine(Decoder):
        """Does nothing."""

        name: ClassVar[str] = "mine"
        source: ClassVar[Source] = Source(title="My method", year=2026, arxiv="")
        acts_on: ClassVar[str] = "nothing"

        strength: float = parameter(1.0, float, low=0, high=10, help="how much")

        def plan(self, vlm, batch, layout):
            return DecodingPlan()
''')


@pytest.fixture
def mine(monkeypatch, tmp_path):
    install(
        monkeypatch,
        tmp_path / "mine",
        "my-method",
        modules={"my_method": MINE, "my_broken": "import there_is_no_such_module\n"},
        decoders="mine = my_method:Mine\nbroken = my_broken:Broken\nvcd = my_method:Mine\na+b = my_method:Mine",
    )


def test_names_come_from_the_metadata(mine, vlmfix):
    code, printed, told = vlmfix("decoders")
    assert code == 0
    assert "my_method" not in sys.modules
    assert "\nmine " in printed
    assert "of my-method 1.2" in printed
    assert printed.count("\nvcd ") == 1
    assert "vlmfix: the decoder vcd of my-method 1.2 is refused: vlmfix has one of that name\n" in told
    assert "vlmfix: the decoder 'a+b' of my-method 1.2 is refused: a name has letters, digits, - and _ alone\n" in told
    assert DECODERS["vcd"].__module__ == "vlmfix.decoders.logits.vcd"
    assert [*DECODERS][-2:] == ["broken", "mine"]
    assert len(DECODERS) == len([*DECODERS])


def test_a_name_is_used_as_one_of_vlmfixs_own(mine, vlmfix):
    decoder = parse("vcd+mine:strength=2").decoders[1]
    assert decoder.spec() == "mine:strength=2.0"
    assert decoder.plugins() == {"mine": "my-method 1.2"}
    assert parse("vcd").plugins() == {}
    assert origin_of(DECODERS["vcd"]) is None
    code, printed, _ = vlmfix("decoders", "mine")
    assert code == 0
    assert printed.startswith("mine: My method\nFrom my-method 1.2.\nDoes nothing.\n")
    with pytest.raises(UsageError, match=r"did you mean mine\?"):
        parse("mien")
    with pytest.raises(UsageError, match=r"did you mean strength\?"):
        parse("mine:strenth=2")


def test_a_broken_one_stops_only_what_asks_for_it(mine, vlmfix):
    sentence = (
        "the decoder broken of my-method 1.2 cannot be loaded: ModuleNotFoundError: "
        "No module named 'there_is_no_such_module'"
    )
    with pytest.raises(PluginError) as caught:
        parse("broken")
    assert caught.value.message == sentence
    code, printed, told = vlmfix("decoders", "broken")
    assert (code, printed) == (1, "")
    assert told.endswith(f"vlmfix: {sentence}\nhint: repair or uninstall that distribution\n")
    code, printed, told = vlmfix("decoders", "--json")
    assert code == 0
    listed = {info["name"]: info["made_by"] for info in json.loads(printed)}
    assert listed["mine"] == "my-method 1.2"
    assert listed["vcd"] == ""
    assert "broken" not in listed
    assert f"vlmfix: {sentence}\n" in told


def test_doctor_says_what_is_broken_and_tries_the_rest(mine, vlmfix, monkeypatch):
    monkeypatch.setattr(DECODERS, "homes", {"greedy": DECODERS.homes["greedy"]})
    code, printed, _ = vlmfix("doctor", "--json")
    found = json.loads(printed)
    assert code == 0
    assert [*found["decoders"]] == ["greedy", "broken", "mine"]
    assert found["ways"]["mine"] == {"plain": None, "beams": None, "static cache": None}
    assert found["decoders"]["broken"].startswith("the decoder broken of my-method 1.2 cannot be loaded")
    assert len(found["refused"]) == 2
    assert all("my-method 1.2 is refused" in sentence for sentence in found["refused"])
    code, printed, _ = vlmfix("doctor", "--decoder", "greedy+mine:strength=2")
    assert code == 0
    assert re.search(r"\ngreedy\+mine:strength=2 +works +works +works", printed)
    assert "the decoder vcd of my-method 1.2 is refused: vlmfix has one of that name" in printed
    code, _, told = vlmfix("doctor", "--decoder", "broken")
    assert code == 1
    assert told.startswith("vlmfix: the decoder broken of my-method 1.2 cannot be loaded")


def test_two_distributions_with_one_name_are_both_refused(monkeypatch, tmp_path, vlmfix):
    for name in ("first", "second"):
        install(monkeypatch, tmp_path / name, name, modules={"my_method": MINE}, decoders="mine = my_method:Mine")
    assert "mine" not in DECODERS
    for name in ("third", "fourth"):
        install(monkeypatch, tmp_path / name, name, families="my_vl = no:No", benchmarks="words = no:No")
    code, _, told = vlmfix("eval", "words", "--out", "y")
    assert code == 2
    assert "vlmfix: the benchmark words is refused: fourth 1.2 and third 1.2 both have one of that name\n" in told
    with pytest.raises(UnsupportedModelError, match="the family my_vl is refused: fourth"):
        family_of("my_vl")
    code, _, told = vlmfix("run", "x", "--out", "y", "--decoder", "mine")
    assert code == 2
    assert told == (
        "vlmfix: the decoder mine is refused: first 1.2 and second 1.2 both have one of that name\n"
        "hint: uninstall one of the two\n"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MINE.replace('"mine"', '"other"'), "the decoder mine of my-method 1.2 says name = 'other'"),
        (MINE.replace("def plan", "def plans"), "the decoder mine of my-method 1.2 has no plan"),
        (MINE.replace("    acts_on", "    acts"), "the decoder mine of my-method 1.2 has no acts_on"),
        (MINE.replace("@dataclass(frozen=True, kw_only=True)\n", ""), "mine of my-method 1.2 is no dataclass"),
        ("Mine = 3", "the decoder mine of my-method 1.2 is no class that inherits Decoder"),
        ("raise SystemExit('gone')", "the decoder mine of my-method 1.2 cannot be loaded: SystemExit: gone"),
    ],
)
def test_what_cannot_be_used_says_why(text, problem, monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "x", "my-method", modules={"my_method": text}, decoders="mine = my_method:Mine")
    with pytest.raises(PluginError, match=problem):
        parse("mine")


def test_families_have_model_types_as_names(monkeypatch, tmp_path):
    text = "from vlmfix.extend import Llava\nclass Mine(Llava):\n    title, model_types = 'Mine', frozenset({'my_vl'})"
    homes = "my_vl = my_family:Mine\nother_vl = my_family:Mine\nllava = my_family:Mine"
    install(monkeypatch, tmp_path / "x", "my-family", modules={"my_family": text}, families=homes)
    assert family_of("my_vl").title == "Mine"
    assert family_of("llava").title == "LLaVA-1.5"
    assert [*FAMILIES][-2:] == ["my_vl", "other_vl"]
    assert "Mine" not in [family.title for family in families()]
    with pytest.raises(PluginError, match=r"family other_vl of my-family 1\.2 says model_types"):
        family_of("other_vl")
    with pytest.raises(UnsupportedModelError, match=r"did you mean my_vl\? supported model types: llava.*, my_vl"):
        family_of("my_v1")


def test_profilers_and_benchmarks_are_listed_and_told(monkeypatch, tmp_path, vlmfix):
    install(monkeypatch, tmp_path / "x", "more", profilers="gain = no:No", benchmarks="score = no:No\nwords = no:No")
    assert [*PROFILERS][-1] == "gain"
    assert [*TASKS][-1] == "words"
    assert TASKS.refused() == ["the benchmark score of more 1.2 is refused: vlmfix has one of that name"]
    code, printed, _ = vlmfix("eval", "--help")
    assert code == 0
    assert "  words      From more 1.2." in printed
    code, _, told = vlmfix("eval", "words", "--out", tmp_path / "out")
    assert code == 1
    assert "the benchmark words of more 1.2 cannot be loaded: ModuleNotFoundError: No module named 'no'" in told
    code, _, told = vlmfix("eval", "mine.py", "--out", tmp_path / "out")
    assert code == 2
    assert "mine.py names no class\nhint: write mine.py:CLASS, with the name of the benchmark's class" in told
    with pytest.raises(PluginError, match=r"the profiler gain of more 1\.2 cannot be loaded"):
        profilers_of(["gain"])
    with pytest.raises(UsageError, match=r"unknown profiler 'gian' \(did you mean gain\? known profilers: vhd"):
        profilers_of(["gian"])


@pytest.mark.parametrize("table", [DECODERS, PROFILERS, TASKS], ids=lambda table: table.noun)
def test_vlmfixs_own_are_called_what_their_classes_say(table):
    assert {name: table[name].name for name in table.homes} == {name: name for name in table.homes}
    assert all(origin_of(table[name]) is None for name in table.homes)
