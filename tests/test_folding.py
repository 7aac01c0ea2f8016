"""`vlmfix export`: a checkpoint that transformers loads alone, and that gives the decoder's tokens."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.heads.made import made_profile
from vlmfix.decoders import parse
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.folding import export, fold
from vlmfix.generation import load

HEADS = "ph3:heads=L0H2/L1H0/L2H5"
PICTURE = Image.radial_gradient("L").convert("RGB")
QUESTION = "Describe this picture."


@pytest.mark.parametrize(
    ("model", "folded", "told"),
    [
        ("tiny", f"{HEADS}+nullu:rank=8,layers=1:3", "L0H2 x 0, L1H0 x 0, L2H5 x 0, 8 directions out of L1, 8 "),
        ("tiny-qwen", "nullu:rank=8,layers=all", "8 directions out of L0, 8 directions out of L1"),
    ],
)
def test_transformers_alone_gives_the_decoders_tokens(model, folded, told, tmp_path, vlmfix):
    out = tmp_path / "new" / "folded"
    code, said, _ = vlmfix("export", model, "--decoder", folded, "--out", out)
    assert code == 0
    assert told in said
    vlm = load(model, device="cpu", dtype="float32")
    expected, plain = (
        vlm.generate([PICTURE], QUESTION, decoder=decoder, max_new_tokens=16)[0].ids for decoder in (folded, "greedy")
    )
    assert expected != plain
    alone, processor = (kind.from_pretrained(out) for kind in (AutoModelForImageTextToText, AutoProcessor))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = processor(text=text, images=[PICTURE], return_tensors="pt")
    tokens = alone.generate(**given, max_new_tokens=16, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tuple(tokens.tolist()) == expected
    again = load(str(out), device="cpu", dtype="float32")
    assert again.generate([PICTURE], QUESTION, max_new_tokens=16)[0].ids == expected
    card = json.loads((out / "vlmfix.json").read_text())
    assert card["folded"] == parse(folded).spec()
    assert card["mlp_directions_removed"]["1"] == 8
    assert (model == "tiny") == (card["head_factors"].get("0", [1, 1, 1])[2] == 0)
    assert card["model"]["id"] == model
    code, _, said = vlmfix("export", model, "--decoder", folded, "--out", out)
    assert (code, f"{out} is there already" in said) == (2, True)
    assert [path.name for path in out.parent.iterdir()] == ["folded"]


@pytest.mark.parametrize("spec", ["vcd", "spin", "greedy", f"{HEADS}+vcd"])
def test_what_no_weights_can_hold_is_refused_with_the_reason(spec, tmp_path):
    vlm = load("tiny", device="cpu", dtype="float32")
    with pytest.raises(IncompatibleDecodersError, match="cannot be folded into weights: "):
        export(vlm, parse(spec), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_factors_multiply_the_outputs_of_heads():
    vlm = load("tiny", device="cpu", dtype="float32")
    module = list(vlm.family.attention_modules(vlm.model))[1]
    outputs = torch.randn(3, vlm.heads, module.o_proj.in_features // vlm.heads)
    gain = torch.rand(vlm.heads)
    expected = module.o_proj((outputs * gain[:, None]).flatten(1))
    fold(vlm, {1: gain})
    torch.testing.assert_close(module.o_proj(outputs.flatten(1)), expected)


def test_parts_of_a_chain_are_folded_together():
    vlm = load("tiny", device="cpu", dtype="float32")
    both = parse("ph3:heads=L0H1+ph3:heads=L0H2/L3H0").folded(vlm)
    assert sorted(both) == [0, 3]
    assert both[0].tolist()[:4] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("model", "spec", "factor"),
    [("tiny", "spin:kept_share=0,suppression=0,layers=-1", 0.0), ("tiny-qwen", "vhr:profile=FILE,alpha=3", 3.0)],
)
def test_constant_factors_of_spin_and_vhr_give_the_decoders_tokens(model, spec, factor, tmp_path):
    vlm = load(model, device="cpu", dtype="float32")
    scores = torch.rand(vlm.layers, vlm.heads, generator=torch.Generator().manual_seed(3))
    made_profile(vlm, "vhd", scores).save(tmp_path / "vhd.safetensors")
    decoder = parse(spec.replace("FILE", str(tmp_path / "vhd.safetensors")))
    plain, expected = (
        vlm.generate([PICTURE], QUESTION, decoder=one, max_new_tokens=12)[0].ids for one in ("greedy", decoder)
    )
    assert expected != plain
    done = export(vlm, decoder, tmp_path / "folded")
    again = load(str(tmp_path / "folded"), device="cpu", dtype="float32")
    assert again.generate([PICTURE], QUESTION, max_new_tokens=12)[0].ids == expected
    assert {found for *_, found in done.heads} == {factor}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("vhr", "measures its heads for each question .give profile=FILE"),
        ("spin", "ranks 8 heads by each row's look at the picture, and turns 1 down"),
        ("spin:kept_share=0", "leaves the prompt's rows before the last as they are"),
    ],
)
def test_what_depends_on_rows_says_so(spec, reason):
    vlm = load("tiny", device="cpu", dtype="float32")
    with pytest.raises(IncompatibleDecodersError, match=reason):
        parse(spec).folded(vlm)


def test_what_changes_nothing_has_no_factors():
    vlm = load("tiny", device="cpu", dtype="float32")
    for spec in ("spin:suppression=1", "spin:kept_share=1", "ph3:share=0"):
        assert parse(spec).folded(vlm) == {}
