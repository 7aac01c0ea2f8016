"""What `vlmfix decoders` and `vlmfix doctor` say."""

import json
import re

import pytest

from vlmfix.decoders import DECODERS
from vlmfix.display import diagnosis_text
from vlmfix.settings import decoding_text
from vlmfix.upstream import names
from vlmfix.upstream.contracts import CONTRACTS


def test_decoders_are_listed(vlmfix):
    code, printed, _ = vlmfix("decoders")
    assert code == 0
    for name in DECODERS:
        assert f"\n{name} " in printed
    assert "noise_seed" not in printed
    assert printed.splitlines()[-1].startswith("Parameters and presets: vlmfix decoders NAME")
    code, printed, _ = vlmfix("decoders", "--json")
    listed = {info["name"]: info for info in json.loads(printed)}
    assert list(listed) == list(DECODERS)
    assert set(listed["vcd"]) == {
        "name",
        "made_by",
        "title",
        "summary",
        "arxiv",
        "code",
        "acts_on",
        "cost",
        "passes",
        "beams",
        "compiles",
        "refines",
        "chooses",
        "parameters",
        "presets",
    }
    contrast = next(p for p in listed["vcd"]["parameters"] if p["name"] == "contrast")
    assert (contrast["default"], contrast["range"]) == (1.0, "float in [0, 10]")
    assert (listed["greedy"]["passes"], listed["vcd"]["passes"], listed["inter"]["passes"]) == (1, 2, 4)


def test_a_named_decoder_is_described(vlmfix):
    code, printed, _ = vlmfix("decoders", "act", "beam")
    assert code == 0
    first, second = printed.split("\n\nbeam: ")
    assert first.startswith(
        "act: Attention Calibration Technique (arXiv 2406.15765; https://github.com/GATECH-EIC/ACT)"
    )
    assert "preset=official-code: sink_threshold=0.1, spared=first-sink, spared_tail=0" in first
    assert re.search(r"kept_fraction +0\.4 +float in \[0, 1\] +beta", first)
    assert second.startswith("Plain decoding, beam search\nThe model as it is, searched with beams")
    assert "Rows per sample: 5. Beam search works" in second
    code, everything, _ = vlmfix("decoders", "--all")
    assert first in everything
    assert all(f"\n{name}: " in f"\n{everything}" for name in DECODERS)
    code, printed, _ = vlmfix("decoders", "vcd", "--json")
    assert [info["name"] for info in json.loads(printed)] == ["vcd"]
    code, printed, told = vlmfix("decoders", "vdc")
    assert (code, printed) == (2, "")
    assert told.startswith(
        "vlmfix: unknown decoder 'vdc'\nhint: did you mean vcd? known decoders: greedy, sample, beam"
    )


def test_doctor_says_what_works(model, vlmfix, monkeypatch):
    monkeypatch.setattr(DECODERS["var"], "check", lambda self, vlm: "it has no visual sinks")
    code, printed, _ = vlmfix("doctor", model)
    assert code == 0
    lines = printed.splitlines()
    assert any(line.split() == ["vcd", "works", "works", "works"] for line in lines)
    assert any(line.split() == ["var", "no", "no", "no", "it", "has", "no", "visual", "sinks"] for line in lines)
    assert f"{len(CONTRACTS)} of {len(CONTRACTS)} things that vlmfix builds on are as it needs them" in lines[-1]
    assert any("sampling, own generate, recorded steps work, but for:" in line for line in lines)
    assert any(line.startswith("  own generate of carve: refused: carve changes pictures") for line in lines)
    diagnosis = json.loads(vlmfix("doctor", model, "--json")[1])
    assert diagnosis["support"]["vcd"]["recorded steps"] == "works"
    assert diagnosis["decoders"]["var"] == "it has no visual sinks"
    assert diagnosis["decoders"]["greedy"] is None
    assert diagnosis["ways"]["sgrs"]["plain"] is None
    assert "does not work with beam search" in diagnosis["ways"]["sgrs"]["beams"]
    assert "dynamic cache" in diagnosis["ways"]["sgrs"]["static cache"]
    assert [finding["reason"] for finding in diagnosis["contracts"]] == [None] * len(CONTRACTS)
    assert diagnosis["model"]["layers"] == 3
    assert f"sink rate  {diagnosis['sinks']['rate']:.0%} of heads give the first token over 30%" in printed
    assert diagnosis["machine"]["memory"] > 0


@pytest.mark.parametrize(
    ("value", "works", "does_not"),
    [("features", "locore", "vcd"), ("cache", None, "greedy")],
)
def test_doctor_says_what_a_renamed_argument_breaks(value, works, does_not, model, vlmfix, monkeypatch):
    monkeypatch.setitem(names.KNOWN, value, ("under_another_name",))
    code, printed, _ = vlmfix("doctor", model, "--json")
    diagnosis = json.loads(printed)
    assert code == 0
    assert works is None or diagnosis["decoders"][works] is None
    assert diagnosis["decoders"][does_not] is not None
    broken = [finding["protects"] for finding in diagnosis["contracts"] if finding["reason"]]
    assert any(does_not in protects or "everything" in protects for protects in broken)


def test_what_doctor_finds_is_text():
    machine = {"system": "[bold]", "cores": 2, "memory": 1, "memory_available": 1, "gpus": []}
    model = {"id": "m[/x]\x1b", "family": "LLaVA", "layers": 2, "device": "cpu", "dtype": "float32"}
    shown = diagnosis_text(
        {
            "machine": machine,
            "model": model,
            "versions": {"torch": "[red]1"},
            "sinks": {"rate": None, "reason": "[/none]"},
            "untested": [],
            "refused": [],
            "contracts": [],
            "ways": {"vcd": {"plain": "[/why]", "beams": None}},
            "reach": {"vcd": None},
            "support": {"vcd": {"sampling": "refused: [/so]"}},
            "checkpoint": {"ends": [2], "set_aside": {"[b]": "[/b]"}, "completed": {}},
        }
    )
    assert r"m[/x]\u001b: LLaVA" in shown
    assert "[bold]" in shown
    assert "[/why]" in shown
    assert "torch [red]1" in shown
    assert "not known: [/none]" in shown
    assert "  sampling of vcd: refused: [/so]" in shown


def test_generation_settings_in_words_are_short():
    always = {"max_new_tokens": 3, "num_beams": 1, "temperature": 0, "seed": 0}
    assert decoding_text(always) == "up to 3 tokens"
    asked = {"stop": [".", "\n"], "repetition_penalty": 1.5, "system": "a" * 300, "top_k": None}
    said = decoding_text(always | asked)
    assert said.startswith("up to 3 tokens, repetition penalty 1.5, stop at '.' or '\\n', system message 'aaa")
    assert len(said) < 200
