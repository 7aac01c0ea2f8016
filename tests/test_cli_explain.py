"""What `vlmfix explain` says, and that a call does as it says."""

import json

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, STRONG, batch_of, method_of, vlm_of
from vlmfix.decoding import prefix
from vlmfix.decoding.running import running
from vlmfix.fitting import key_bytes
from vlmfix.planned import parts_of, planned
from vlmfix.reports.explanation import layers_text
from vlmfix.upstream import cache as caches


def explained(vlmfix, *arguments):
    code, printed, _ = vlmfix("explain", *arguments, "--json")
    assert code == 0
    return json.loads(printed)


def test_declarations_say_what_each_part_does(vlmfix, tmp_path):
    code, printed, _ = vlmfix("explain", "locore+vcd:contrast=0.5")
    assert code == 0
    assert "Local Coherence Reinforcement: multiplies attention to the last few tokens" in printed
    assert "contrast=0.5 in place of 1.0: alpha, weight of the contrast" in printed
    assert "Acts on: logits of 2 branches." in printed
    assert "Rows per sample: 2 with the defaults of its parts." in printed
    assert "Recorded steps with gemma3: not applicable: the model has sliding windows." in printed
    assert "Conflict" not in printed
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('decoder = "vcd:contrast=1.0,preset=official-code"')
    (part,) = explained(vlmfix, f"@{recipe}")["parts"]
    differing = {one["name"]: (one["value"], one["default"]) for one in part["parameters"]}
    meant = method_of("vcd:contrast=1.0,preset=official-code").parameters()
    plain = method_of("vcd").parameters()
    assert differing == {name: (str(meant[name]), str(plain[name])) for name in meant if meant[name] != plain[name]}
    assert differing["preset"] == ("official-code", "paper")
    assert "contrast" not in differing


@pytest.mark.parametrize(
    ("spec", "conflicts"),
    [
        ("vcd+carve", ["carve refines the pictures before decoding begins, so it must come first"]),
        ("carve+vicrop", ["carve and vicrop both refine the pictures"]),
        ("sample+beam", ["sample and beam both choose the tokens"]),
        ("beam+sgrs", ["sgrs does not work with beam search"]),
        ("beam:num_beams=1+sgrs", []),
        ("carve+var+vcd+inter", []),
    ],
)
def test_conflicts_are_told_from_declarations_and_refused_by_the_model(spec, conflicts, vlmfix):
    assert explained(vlmfix, spec)["conflicts"] == conflicts
    found = planned(vlm_of("llava"), parts_of(spec.replace("+var", "")), max_new_tokens=4)
    assert len(found["conflicts"]) == len(conflicts)
    assert (found["total"] is None) == bool(conflicts)


def test_with_a_model_it_says_where_parts_act_and_what_is_refused(vlmfix, model):
    spec = "spin+pai:layers=1:+inter+icd"
    code, printed, _ = vlmfix("explain", spec, "--model", model)
    assert code == 0
    printed = " ".join(printed.split())
    assert "Changes attention weights in" in printed
    assert "Changes attention scores in layers 1-2 of 3; rows: the prompt's last row" in printed
    assert "Branch: a row more per sample, with no picture and" in printed
    assert "because a branch has a longer prompt than the question" in printed
    total = explained(vlmfix, spec, "--model", model)["model"]["total"]
    assert (total["rows"], total["pictures"], total["beams_work"], total["recorded"]) == (6, 2, [], [])
    code, printed, _ = vlmfix("explain", "var", "--model", model)
    assert code == 0
    assert "Refuses: the model has no sink dimensions" in printed
    assert "not reckoned, since something is refused" in printed
    code, _, told = vlmfix("explain", "vcd:contrast=11", "--model", model)
    assert code == 2
    assert "loading" not in told
    for spec, problem in (
        ("vcd:contrast=11", "contrast=11.0"),
        ("sgrs:draw=first", "draw='first'"),
        ("beam+vcd:margin=0.2", "margin=0.2 does nothing with when=always"),
    ):
        code, printed, told = vlmfix("explain", spec)
        assert (code, printed) == (2, "")
        assert problem in told
    code, _, told = vlmfix("explain", "vcd", "--num-beams", 2)
    assert (code, told.splitlines()[1]) == (2, "hint: add --model, or leave them out")


@pytest.mark.parametrize(("name", "beams"), [("chain", 1), ("icd", 3), ("zerotuning", 1), ("m3id", 1)])
@torch.no_grad()
def test_a_call_has_the_rows_and_takes_the_memory_that_was_said(name, beams):
    vlm, method = vlm_of("qwen2_5_vl"), method_of(STRONG[name])
    total = planned(vlm, parts_of(STRONG[name]), max_new_tokens=8, num_beams=beams)["total"]
    batch = batch_of(vlm, [0])
    plan = method.plan(vlm, batch, vlm.layout(batch))
    with running(vlm, batch, vlm.layout(batch), plan, limit=8, name=name, reorders=True) as call:
        call.prompt()
        if beams > 1:
            call.keep(torch.zeros(beams, dtype=torch.long))
        keys = [pair for pair in caches.keys_and_values(call.cache)]
    rows, _, tokens, _ = keys[0][0].shape
    assert rows == total["rows"]
    assert sum(x.nbytes for pair in keys for x in pair) == rows * tokens * key_bytes(vlm)
    assert total["bytes"] == rows * (total["padded"] + 8) * key_bytes(vlm)


@pytest.mark.parametrize(
    ("layers", "count", "text"),
    [
        ([], 4, "no layer"),
        ([0, 1, 2], 3, "all 3 layers"),
        ([2], 3, "layer 2 of 3"),
        ([0, 1, 3], 5, "layers 0-1, 3 of 5"),
        ([4], None, "layer 4"),
    ],
)
def test_layers_in_words(layers, count, text):
    assert layers_text(layers, count) == text


KINDS = ("locore", "var", "vhr", "zerotuning", "zerotuning-text", "vaf", "act", "vcd", "pai")
"""Methods that edit the last row, the text or all of the prompt, read the residual stream, or have branches."""


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("name", KINDS)
def test_beginnings_are_shared_and_prompts_cut_where_that_was_said(family, name, monkeypatch):
    vlm, shared, cut = vlm_of(family), [], []
    run, pieces = prefix._run, prefix._pieces
    monkeypatch.setattr(prefix, "_run", lambda *given: shared.append(given) or run(*given))
    monkeypatch.setattr(prefix, "_pieces", lambda *given: cut.append(pieces(*given)) or cut[-1])
    total = planned(vlm, parts_of(STRONG[name]), max_new_tokens=1)["total"]
    shown = PICTURES[0][0]
    vlm.generate([shown, shown], [PROMPTS[0], PROMPTS[0] + "?"], decoder=STRONG[name], max_new_tokens=1)
    assert bool(shared) == (not total["shares"])
    cut.clear()
    monkeypatch.setattr(prefix, "PIECE", 8)
    monkeypatch.setattr(prefix, "COLUMNS", 8)
    vlm.generate([shown], PROMPTS[0], decoder=STRONG[name], max_new_tokens=1)
    assert any(len(found) > 1 for found in cut) == (not total["pieces"])
