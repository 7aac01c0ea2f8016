"""ViCrop's three maps against slow versions of them, and what they find."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.contracts.support import PICTURES, PROMPTS, picture, vlm_of
from tests.contracts.test_reference import Slow, installed, same
from tests.decoders.bright import BRIGHT_AT, QUESTION, bright_vlm, scene
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import ViCrop
from vlmfix.decoders.picture.pixels import View, edge_gradients, edges, views
from vlmfix.decoders.picture.probing import attention_gradients, attention_maps, pixel_gradients
from vlmfix.decoders.picture.refined import PictureMap
from vlmfix.errors import UsageError
from vlmfix.generation import VLM


def exact(family):
    """The tiny model in float64."""
    tiny = vlm_of(family)
    model = copy.deepcopy(tiny.model).double()
    return VLM(model=model, processor=tiny.processor, family=tiny.family, name=family)


def certainty(vlm, inputs):
    with torch.no_grad():
        return vlm.model(**inputs, use_cache=False).logits[0, -1].double().log_softmax(-1).max().item()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_grad_att_is_attention_times_what_finite_differences_say(family):
    vlm, layer, step = exact(family), 1, 1e-2
    batch = vlm.encode([PROMPTS[0]], [PICTURES[0]])
    ((found,), _) = attention_gradients(vlm, batch, LayerSet(str(layer)))
    rows = {}

    def keep(number, b, h, q, row):
        if number == layer and q == batch.length - 1:
            rows[h] = row
        return row

    with installed(vlm, Slow(same, keep)):
        certainty(vlm, batch)
    columns = vlm.layout(batch).tokens[0].nonzero().squeeze(1)[[0, 7, -1]].tolist()
    for column in columns:
        owed = []
        for head in range(8):

            def moved(number, b, h, q, row, amount, head=head, column=column):
                if number == layer and q == batch.length - 1 and h == head:
                    row = row.clone()
                    row[column] += amount
                return row

            ends = []
            for amount in (step, -step):
                rule = lambda *site, amount=amount, moved=moved: moved(*site, amount)  # noqa: E731
                with installed(vlm, Slow(same, rule)):
                    ends.append(certainty(vlm, batch))
            owed.append(float(rows[head][column]) * max(0.0, (ends[0] - ends[1]) / (2 * step)))
        assert float(found[0, column]) == pytest.approx(np.mean(owed), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "idefics3"])
def test_pixel_gradients_are_what_finite_differences_say(family):
    vlm, step = exact(family), 1e-3
    batch = vlm.encode([PROMPTS[0]], [PICTURES[0]])
    got = pixel_gradients(vlm, batch)
    assert got.shape == batch["pixel_values"].shape
    for place in got.abs().flatten().topk(2).indices.tolist():
        ends = []
        for amount in (step, -step):
            pixels = batch["pixel_values"].clone()
            pixels.view(-1)[place] += amount
            ends.append(certainty(vlm, {**batch, "pixel_values": pixels}))
        assert got.flatten()[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)


@pytest.mark.parametrize(
    "family", ["llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm"]
)
def test_pixels_stand_where_they_were_cut_from(family):
    """The pixels themselves, taken for a gradient, are brightest where the picture is, in every view."""
    vlm = vlm_of(family)
    box = (0.5, 0.25, 0.75, 0.5)
    shown = Image.new("RGB", (96, 96), (128, 124, 116))
    ImageDraw.Draw(shown).rectangle((48, 24, 71, 47), fill=(255, 255, 255))
    batch = vlm.encode(["what?"], [[shown]])
    found = views(vlm, batch, batch["pixel_values"].cpu())
    layout = vlm.layout(batch)
    assert sum(len(view.columns) for view in found) == int(layout.tokens.sum())
    seen = 0
    for view in found:
        high, wide = view.strength.shape
        x0, y0, x1, y1 = view.box
        y, x = np.mgrid[:high, :wide]
        across, down = x0 + (x + 0.5) / wide * (x1 - x0), y0 + (y + 0.5) / high * (y1 - y0)
        inside = (across > box[0] + 0.06) & (across < box[2] - 0.06) & (down > box[1] + 0.06) & (down < box[3] - 0.06)
        outside = (across < box[0] - 0.06) | (across > box[2] + 0.06) | (down < box[1] - 0.06) | (down > box[3] + 0.06)
        if inside.any() and outside.any():
            assert view.strength[inside].min() > view.strength[outside].max()
            seen += 1
    assert seen >= 1


def test_rel_att_is_the_quotient_of_two_prompts():
    vlm, decoder = vlm_of("llava"), ViCrop(base=12, layers="0/2", terse=False)
    vlm.memo.clear()
    (found,) = vlm.refine([PICTURES[0]], PROMPTS[0], decoder=decoder)
    tokens, maps = [], []
    for prompt in (PROMPTS[0], decoder.general_prompt):
        batch = vlm.encode([prompt], [PICTURES[0]])
        tokens.append(vlm.layout(batch).tokens[0])
        maps.append(attention_maps(vlm, batch, LayerSet("0/2"))[0][0, :, tokens[-1]].double())
    expected = (maps[0] / maps[1]).mean(dim=0).view(5, 5).numpy()
    np.testing.assert_allclose(found.looks[0].map.values, expected, rtol=1e-4)


def test_the_same_question_twice_has_no_peak():
    vlm, decoder = vlm_of("llava"), ViCrop(base=12)
    (found,) = vlm.refine([PICTURES[0]], decoder.general_prompt, decoder=decoder)
    np.testing.assert_allclose(found.looks[0].map.values, 1, rtol=1e-5)


@pytest.mark.parametrize("size", [(200, 200), (320, 200), (200, 300)])
@pytest.mark.parametrize("enlarge", [False, True])
def test_the_object_asked_about_is_in_the_window(size, enlarge):
    vlm, (shown, box) = bright_vlm(), scene(size)
    (found,) = vlm.refine([shown], QUESTION, decoder=ViCrop(layers="1", base=50, enlarge=enlarge))
    (look,) = found.looks
    assert found.pictures == (shown, look.picture)
    assert look.box[0] < (box[0] + box[2]) / 2 < look.box[2]
    assert look.box[1] < (box[1] + box[3]) / 2 < look.box[3]
    assert np.asarray(look.picture).max() == 255
    assert np.unravel_index(look.map.values.argmax(), (5, 5)) == BRIGHT_AT
    assert (max(look.picture.size) >= 200) == enlarge


def test_blocks_find_what_is_small_in_a_large_picture():
    vlm = bright_vlm()
    shown = Image.new("RGB", (400, 200), (40, 40, 40))
    ImageDraw.Draw(shown).rectangle((320, 80, 359, 119), fill=(255, 255, 255))  # a cell of the right block
    (found,) = vlm.refine([shown], QUESTION, decoder=ViCrop(layers="1", base=50, high_resolution=True, block=200))
    (look,) = found.looks
    assert look.map.values.shape == (5, 10)
    assert look.map.values.argmax() == 2 * 10 + 8
    assert look.box[0] < 0.85 < look.box[2]


def test_edges_are_where_the_texture_is():
    shown = np.full((60, 60, 3), 90, dtype=np.uint8)
    shown[20:40, 30:50] = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    marked = edges(Image.fromarray(shown), 60, 60, 3)
    assert marked[24:36, 34:46].mean() > 0.9
    assert marked[:15].sum() == 0
    assert edges(Image.new("RGB", (60, 60), "red"), 60, 60, 7).sum() == 0


def test_pure_grad_takes_the_window_of_the_texture():
    shown = np.full((120, 120, 3), 90, dtype=np.uint8)
    shown[72:96, 24:48] = np.random.default_rng(0).integers(0, 256, (24, 24, 3))
    view = View(0, np.ones((40, 40)), torch.arange(25), (5, 5), (0, 0, 1, 1))
    found = edge_gradients(view, Image.fromarray(shown), 3, None).view(5, 5)
    assert int(found.argmax()) == 3 * 5 + 1
    assert float(found[0].sum()) == 0
    halved = edge_gradients(view, Image.fromarray(shown), 3, np.full((40, 40), 2.0)).view(5, 5)
    torch.testing.assert_close(halved, found / 2)


def test_a_plain_picture_has_no_edges_and_no_peak():
    vlm = vlm_of("llava")
    (found,) = vlm.refine([Image.new("RGB", (60, 60), "red")], "what?", decoder=ViCrop(base=12, method="pure-grad"))
    assert "flat" in found.looks[0].problem
    assert found.looks[0].box == pytest.approx((0, 0, 12 / 60, 12 / 60))


def test_what_is_no_number_is_replaced_and_logged(caplog):
    values = np.ones((5, 5))
    values[2, 2], values[0, 0] = np.inf, np.nan
    with caplog.at_level(logging.INFO, logger="vlmfix.decoders.picture.vicrop"):
        look = ViCrop(base=12).look(vlm_of("llava"), picture(1, (60, 60)), PictureMap(values))
    assert np.isfinite(look.map.values).all()
    assert "no numbers" in caplog.text


@pytest.mark.parametrize(
    ("family", "count", "layer", "base"),
    [("llava", 32, 14, 40), ("qwen2_5_vl", 36, 22, 224), ("qwen2_5_vl", 28, 17, 224)],
)
def test_defaults_follow_the_model(family, count, layer, base, monkeypatch):
    vlm = vlm_of(family)
    monkeypatch.setattr(type(vlm.family), "layers", lambda self, model: [None] * count)
    assert str(ViCrop().layers_of(vlm)) == str(layer)
    assert ViCrop().base_of(vlm) == base
    assert ViCrop(base=77).base_of(vlm) == 77


def test_presets():
    paper = ViCrop(preset="paper")
    assert (paper.by_area, paper.median, paper.against_general, paper.covering) == (False, 3, False, True)
    assert (ViCrop().by_area, ViCrop().median, ViCrop().against_general, ViCrop().covering) == (True, 7, True, False)
    with pytest.raises(UsageError, match="median=4"):
        ViCrop(median=4)
