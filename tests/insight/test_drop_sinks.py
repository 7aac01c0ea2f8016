"""Maps without sinks and stop words: the columns found, against whole maps of attention, and what is left of maps."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, batch_of, vlm_of
from tests.decoders.bright import BRIGHT_AT, QUESTION, bright_vlm, scene
from vlmfix.attention import rows as attention_rows
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import CARVE, ViCrop
from vlmfix.decoders.picture.probing import attention_gradients, compared
from vlmfix.decoders.picture.prompts import GENERAL
from vlmfix.decoders.picture.refined import PictureMemo
from vlmfix.decoders.picture.vicrop import _mean
from vlmfix.errors import UsageError
from vlmfix.insight import sinks
from vlmfix.insight.grounding import grounding
from vlmfix.insight.question import speaking
from vlmfix.upstream.attention import register, switched, unregister

ANSWERS = ([40, 41, 42], [70, 45, 33])


@torch.no_grad()
def whole_maps(vlm, batch):
    """Layer -> (B, H, T, T) weights."""
    found = {}

    def plain(module, query, key, value, attention_mask, scaling, **kwargs):
        heads, length = query.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        allowed = torch.ones(length, length, dtype=torch.bool).tril() if attention_mask is None else attention_mask
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -1e30).softmax(-1)
        found[module.layer_idx] = weights
        return (weights @ value).transpose(1, 2).contiguous(), None

    register("slow_sinks", plain)
    try:
        with switched([vlm.family.decoder(vlm.model), *vlm.family.attention_modules(vlm.model)], "slow_sinks"):
            vlm.model(**batch, use_cache=False)
    finally:
        unregister("slow_sinks")
    return found


def slow(vlm, batch, layers, surplus):
    """(B, layers, T) bool, token by token."""
    image, maps = vlm.layout(batch).tokens, whole_maps(vlm, batch)
    found = torch.zeros(batch.rows, len(layers), batch.length, dtype=torch.bool)
    for row in range(batch.rows):
        end = int(image[row].nonzero()[-1])
        real = [one for one in batch.attention_mask[row].nonzero()[:, 0].tolist() if one <= end]
        for place, layer in enumerate(layers):
            for column in image[row].nonzero()[:, 0].tolist():
                seeing = [one for one in real if one >= column]
                if len(seeing) < len(real) / 10:
                    continue
                mean = float(maps[layer][row, :, seeing, column].double().mean())
                found[row, place, column] = mean > surplus / len(real)
    return found


@pytest.mark.parametrize(("family", "block"), [("llava", 1 << 25), ("llava", 4096), ("qwen2_5_vl", 1 << 25)])
def test_sinks_are_columns_that_all_rows_look_at(family, block, monkeypatch):
    monkeypatch.setattr(sinks, "SURPLUS", 1.5)  # a random model has few at 5
    monkeypatch.setattr(attention_rows, "BLOCK", block)
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    expected = slow(vlm, batch, (0, 2), 1.5)
    assert expected.any()
    _, found = attention_gradients(vlm, batch, LayerSet("0/2"), drop_sinks=True)
    assert torch.equal(found, expected)
    found = compared(vlm, PICTURES, PROMPTS, GENERAL, LayerSet("0/2"), PictureMemo().of(0), steps=3, drop_sinks=True)
    shown = vlm.layout(batch).tokens
    for row, own in enumerate(found.sinks):
        assert torch.equal(own, expected[row][:, shown[row]])
    assert [len(own) for own in found.speaking] == [len(own) for own in found.asked]


def test_grounding_averages_over_the_layers_in_which_a_patch_is_no_sink(monkeypatch):
    monkeypatch.setattr(sinks, "SURPLUS", 1.5)
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    out = slow(vlm, batch, (0, 1, 2), 1.5)
    pictures, prompts = list(PICTURES), list(PROMPTS)
    each = [grounding(vlm, pictures, prompts, ANSWERS, layers=str(layer)) for layer in range(3)]
    found = grounding(vlm, pictures, prompts, ANSWERS, drop_sinks=True)
    for row in (0, 1):
        for place in range(3):
            rows = torch.stack([one[row].rows[place, : batch.length] for one in each])  # (layers, T)
            kept = ~out[row]
            expected = (rows * kept).sum(0) / kept.sum(0).clamp(min=1)
            torch.testing.assert_close(found[row].rows[place, : batch.length], expected, atol=1e-5, rtol=1e-4)
            patches = vlm.layout(batch).tokens[row] & kept.any(dim=0)
            torch.testing.assert_close(found[row].picture[place], expected[patches].mean(), atol=1e-5, rtol=1e-4)
        plain = grounding(vlm, pictures, prompts, ANSWERS)[row]
        assert plain.mean("picture") == pytest.approx(float(plain.picture.mean()))
        assert plain.counts.all()


def test_tokens_of_stop_words_do_not_speak():
    vlm = vlm_of("llava")
    ids = vlm.processor.tokenizer("there is a dog.", add_special_tokens=False)["input_ids"]
    told = [
        vlm.processor.tokenizer.decode([token]).strip()
        for token, own in zip(ids, speaking(vlm, ids), strict=True)
        if own
    ]
    assert "".join(told) == "dog"
    ids = vlm.processor.tokenizer("is a", add_special_tokens=False)["input_ids"]
    assert all(speaking(vlm, ids))


def test_carve_leaves_rows_of_stop_words_out():
    question, general = torch.rand(4, 2, 9), torch.rand(3, 2, 9)
    contrast = (question[:3].double() / (general.double() + 1e-8)).sum(dim=1)
    speaks = [False, True, True, True]
    close = torch.testing.assert_close
    close(CARVE(steps="all").fused(question, general, speaks), 2 * contrast[1] + 3 * contrast[2])
    close(CARVE(steps="last").fused(question, general, [True, True, False, True]), contrast[1])
    close(CARVE(steps="last").fused(question, general, [False, False, False, True]), contrast[2])
    own = (question[1].double() / (general[-1].double() + 1e-8)).sum(dim=0)
    close(CARVE(steps="own-last").fused(question, general, [True, True, False, False]), own)


def test_vicrop_leaves_layers_out_in_which_a_patch_is_a_sink():
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    out = torch.tensor([[True, False, True], [False, False, True]])
    assert _mean(values, out).tolist() == [3.0, 3.0, 0.0]
    assert _mean(values, None).tolist() == [2.0, 3.0, 4.0]
    with pytest.raises(UsageError, match="drop_sinks=true does nothing with method=pure-grad"):
        ViCrop(method="pure-grad", drop_sinks=True)
    assert "drop_sinks" not in ViCrop().spec()
    assert CARVE(drop_sinks=True).spec().endswith("drop_sinks=True".lower())


@pytest.mark.parametrize("decoder", [CARVE, ViCrop])
def test_the_patch_asked_about_stays_and_a_sink_goes(decoder, monkeypatch):
    vlm = bright_vlm()
    picture, _ = scene((250, 250))

    def heat(drop):
        options = {"steps": "first"} if decoder is CARVE else {}
        asking = decoder(layers="1", drop_sinks=drop, **options)
        (found,) = asking.refine(vlm, [[picture]], [QUESTION], PictureMemo().of(0))
        return torch.as_tensor(found.looks[0].map.values)

    before, after = heat(False), heat(True)
    assert divmod(int(after.argmax()), 5) == divmod(int(before.argmax()), 5) == BRIGHT_AT
    monkeypatch.setattr(sinks, "SURPLUS", 0.0)  # all of them are
    assert int((heat(True) > 0).sum()) < 5, "those that few rows see are left"
