"""The command, as a person at a terminal meets it, with a tiny random model and few tokens."""

from __future__ import annotations

import json

import pytest

from vlmfix.bench import measure
from vlmfix.bench.shapes import SHAPES
from vlmfix.commands import bench
from vlmfix.reports.bench import cells

QUICK = ("bench", "--device", "cpu", "--tokens", measure.LEAST)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setitem(measure.COPIED, "cpu", 1 << 16)


def test_the_table_shows_what_the_file_holds(tmp_path, model, vlmfix):
    file, quick = tmp_path / "cost.json", (*QUICK, "--model", model)
    decoders = ("--decoder", "vcd", "--decoder", "adhh:heads=L9H9")
    code, printed, told = vlmfix(*quick, *decoders, "--rows", "2,1", "--reference", "--json", file)
    assert code == 0
    assert "vlmfix: 12 of 12 measurements" in told
    document = json.loads(file.read_text())
    lines = document["lines"]
    names = ["greedy", "vcd", "adhh", "generate", "eager, weights kept", "vcd, pass by pass"]
    assert [(line["arm"], line["rows"]) for line in lines] == [(name, rows) for rows in (1, 2) for name in names]
    rows = [row for row in printed.splitlines() if row.startswith(tuple(names))]
    for line, row in zip(lines, rows[: len(lines)], strict=True):
        assert row.split() == [*line["arm"].split(), str(line["rows"]), *cells(line)]
        known = (line["first_ms"], line["step_ms"], line["memory_above_weights"], *line["samples"]["long_s"])
        assert (line["reason"] is not None) == (line["arm"] == "adhh") == (known == (None, None, None))
    by_arm = {(line["arm"], line["rows"]): line for line in lines}
    assert f"adhh (1, 2): {by_arm['adhh', 1]['reason']}"[:80] in printed
    assert by_arm["vcd", 1]["decoder"].startswith("vcd:preset=paper,contrast=")
    assert document["finished"]
    assert document["model"]["device"] == "cpu"
    assert {"torch", "transformers", "vlmfix"} <= set(document["versions"])
    assert f"a question, {document['prompt_tokens']} tokens" in " ".join(printed.split())
    code, _, told = vlmfix(*quick, "--decoder", "vcd", "--rows", "1", "--json", file)
    assert code == 0  # a file of results is replaced
    assert len(json.loads(file.read_text())["lines"]) == 2


def test_it_fails_when_nothing_was_measured(vlmfix):
    code, printed, _ = vlmfix(*QUICK, "--decoder", "vcd", "--rows", "1", "--minutes", 0)
    assert code == 1
    assert "greedy (1), vcd (1): the time was over before the first round\n" in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--rows", "1,0"), "'1,0' is not a list of numbers from 1 on"),
        (("--rows", "many"), "'many' is not a list of numbers from 1 on"),
        (("--model", "tiny", "--shapes", "tiny"), "--model and --shapes are both given"),
        (("--shapes", "llava-13b"), "'llava-13b' is not one of"),
        (("--decoder", "vcd", "--decoder", "vcd"), "--decoder vcd is given twice"),
        (("--decoder", "nonsense"), "unknown decoder 'nonsense'"),
        (("--prompt-tokens", "500"), "the number of tokens that LLaVA-1.5 makes of a picture cannot be chosen"),
        (("--device", "meta"), "device meta cannot be measured"),
        (("--json", "none/cost.json"), "there is no folder none"),
        (("--json", "notes.json"), "this is no file of vlmfix bench"),
    ],
)
def test_wrong_use_is_told_before_anything_is_measured(given, said, tmp_path, vlmfix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.json").write_text('{"kind": "notes"}')
    monkeypatch.setattr(measure, "_take_turn", lambda *_: pytest.fail("measured"))
    code, printed, told = vlmfix(*QUICK, *given)
    assert (code, printed) == (2, "")
    assert said in told
    assert (tmp_path / "notes.json").read_text() == '{"kind": "notes"}'


def test_the_shapes_that_are_offered_are_those_that_can_be_made():
    (offered,) = (option.type.choices for option in bench.bench.params if option.name == "shapes")
    assert list(offered) == list(SHAPES)
