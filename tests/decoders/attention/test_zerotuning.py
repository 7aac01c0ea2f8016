"""ZeroTuning against its specification's invariants: the bias is the scaling of weights that the paper writes down."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, vlm_of
from tests.decoders.attention.test_locore import site
from vlmfix.decoders import Chain, ZeroTuning
from vlmfix.decoders.attention.zerotuning import FirstTokenBias
from vlmfix.errors import IncompatibleDecodersError, UsageError

KEYS = 7
# Two keys of padding, then four tokens and one generated: the first token is key 2.
HERE = site([2, 3, 5, 6], keys=KEYS, prompt=6, image=[4], text=[2, 3, 5])


def scaled(gain, weights, first=2):
    """The specification's form: multiply the first column and divide by the sum."""
    new = weights.clone()
    new[..., first] *= gain
    return new / new.sum(-1, keepdim=True)


def attention(gain, chosen=None, heads=3):
    """(weights, edited weights), (1, H, R, K) float64, causal and without padding keys."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, heads, 4, KEYS, generator=generator, dtype=torch.float64)
    key = torch.arange(KEYS)
    hidden = (key < 2) | (key > HERE.queries[0][:, None])
    bias = FirstTokenBias(gain=gain, chosen=chosen).bias(HERE)
    return tuple(x.masked_fill(hidden, -1e300).softmax(-1) for x in (scores, scores + bias))


@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0, 2.0, 50.0])
def test_the_bias_is_the_scaling_of_weights(gain):
    base, new = attention(gain)
    # The bias is a float32 number, as everything before the softmax; its rounding is what the tolerance allows for.
    torch.testing.assert_close(new[:, :, 1:], scaled(gain, base)[:, :, 1:], atol=1e-7, rtol=1e-6)
    assert torch.equal(new[:, :, 0], base[:, :, 0])  # the first query sees the first token alone
    torch.testing.assert_close(new.sum(-1), torch.ones(1, 3, 4, dtype=torch.float64))


def test_the_first_tokens_share_grows_with_the_gain_and_other_ratios_stay():
    shares = []
    for gain in (0.1, 0.5, 1.0, 2.0, 8.0):
        base, new = attention(gain)
        shares.append(new[:, :, 1:, 2])
        ratio = new[:, :, 3, 3:] / base[:, :, 3, 3:]
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
        change = (new[0, 0, 3, 4] - new[0, 0, 3, 5]) / (base[0, 0, 3, 4] - base[0, 0, 3, 5])
        assert change.item() == pytest.approx(1 / ((gain - 1) * base[0, 0, 3, 2].item() + 1), rel=1e-5)
    for less, more in pairwise(shares):
        assert (more > less).all()


def test_a_gain_and_its_inverse_cancel():
    edits = [FirstTokenBias(gain=gain, chosen=None).bias(HERE) for gain in (4.0, 0.25)]
    close(edits[0] + edits[1], torch.zeros_like(edits[0]), 1e-6)
    vlm = vlm_of("internvl")
    batch = batch_of(vlm)
    there_and_back = Chain(decoders=(ZeroTuning(gain=6.0), ZeroTuning(gain=1 / 6)))
    close(logits(vlm, batch, there_and_back), logits(vlm, batch))


def test_only_chosen_heads_are_scaled():
    base, new = attention(3.0, chosen=torch.tensor([True, False, True]))
    assert torch.equal(new[:, 1], base[:, 1])
    assert ((new != base)[:, [0, 2], 1:].any(-1)).all()


def test_all_heads_share_one_bias():
    assert FirstTokenBias(gain=2.0, chosen=None).bias(HERE).shape == (1, 1, 4, KEYS)
    assert FirstTokenBias(gain=2.0, chosen=None).bias(HERE).unique().tolist() == pytest.approx([0.0, math.log(2)])


def test_no_gain_equals_hiding_the_first_token():
    """A zero gain in every layer gives what masking the first token gives at the rows behind it."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    assert ZeroTuning(layers="0").check(vlm) is None  # its probe would be seen too
    seen = []
    handles = [
        module.register_forward_hook(lambda m, a, out: seen.append(out[0]))
        for module in vlm.family.attention_modules(vlm.model)[:1]
    ]
    try:
        with ZeroTuning(gain=0.0, layers="0").applied(vlm, batch):
            vlm.model(**batch)
        hidden = batch.attention_mask.clone()
        hidden[0, 0] = 0
        positions = torch.arange(batch.length)[None]
        vlm.model(**batch.with_inputs(attention_mask=hidden, position_ids=positions))
    finally:
        for handle in handles:
            handle.remove()
    text = vlm.layout(batch).text_after_image()
    close(seen[0][text], seen[1][text], 1e-5)
    assert seen[0].isfinite().all()


@pytest.mark.parametrize("gain", [0.0, 1e3])
def test_extreme_gains_give_numbers(gain):
    vlm = vlm_of("gemma3")
    assert logits(vlm, batch_of(vlm), ZeroTuning(gain=gain)).isfinite().all()


def test_presets_and_heads():
    assert (ZeroTuning().gain, ZeroTuning(preset="classification").gain) == (0.3, 3.5)
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    assert ZeroTuning(heads=(0, 7)).check(vlm) is None
    with pytest.raises(
        IncompatibleDecodersError, match=r"zerotuning cannot act: heads \[8\] are outside the model's 8"
    ):
        logits(vlm, batch, ZeroTuning(heads=(0, 8)))
    with pytest.raises(UsageError, match="gain=-1"):
        ZeroTuning(gain=-1)


def test_a_model_whose_first_token_is_no_sink_says_so(monkeypatch):
    vlm = vlm_of("llava")
    mass = torch.zeros(3, 8)
    mass[1, 4] = 0.3
    monkeypatch.setattr("vlmfix.decoders.attention.zerotuning.first_token_mass", lambda vlm: mass)
    assert ZeroTuning().check(vlm) is None
    assert ZeroTuning(layers="2:", heads=(3, 5)).check(vlm) is None
    assert "the first token is no sink: no head gives it more than 0.00%" in ZeroTuning(layers="2:").check(vlm)
    assert "none of layers 7" in ZeroTuning(layers="7").check(vlm)


def test_listing_every_head_equals_all():
    vlm = vlm_of("qwen2_vl")
    batch = batch_of(vlm)
    close(logits(vlm, batch, ZeroTuning(heads=tuple(range(8)))), logits(vlm, batch, ZeroTuning()))
