"""Choosing heads and gains: on measures whose best choice is known, and on a tiny model."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import batch_of, logits, vlm_of
from vlmfix.decoders import ACT, Greedy, ZeroTuning
from vlmfix.decoders.attention.act import read_heads
from vlmfix.decoders.attention.calibration import certainty, choose_gain, classify_heads, search_heads
from vlmfix.errors import UsageError

NOISE = (-0.3, -0.1, 0.1, 0.3)


def test_certainty_is_minus_the_entropy_of_the_first_answer_token():
    vlm = vlm_of("llava")
    batches = [batch_of(vlm), batch_of(vlm, [1])]
    found = certainty(vlm, batches)(ZeroTuning(gain=4.0))
    p = torch.cat([logits(vlm, batch, ZeroTuning(gain=4.0), steps=1)[0] for batch in batches]).softmax(-1)
    assert found == pytest.approx((p * p.log()).sum(-1).tolist(), abs=1e-5)
    assert found[1] == pytest.approx(found[2], abs=1e-5)  # the same question, padded or not
    reverse = certainty(vlm, batches[::-1])(ZeroTuning(gain=4.0))
    assert sorted(reverse) == pytest.approx(sorted(found), abs=1e-6)


def test_the_gain_with_the_best_mean_is_chosen():
    def measure(decoder):
        gain = getattr(decoder, "gain", 1.0)
        return [-abs(math.log2(gain) - 2) + 2 + noise * (gain != 1) for noise in NOISE]

    chosen = choose_gain(measure, method=ZeroTuning(heads=(1, 2)))
    assert chosen.decoder == ZeroTuning(gain=4.0, heads=(1, 2))
    assert chosen.gains[4.0].mean == pytest.approx(2.0)
    assert chosen.gains[1.0].mean == 0


def test_no_gain_is_chosen_that_is_not_certainly_better():
    def measure(decoder):
        return [0.01 * (getattr(decoder, "gain", 1.0) > 1) + noise * (type(decoder) is not Greedy) for noise in NOISE]

    assert choose_gain(measure).decoder.gain == 1.0


def test_heads_are_told_apart():
    worth = {0: 0.3, 1: -0.2, 2: 0.1, 3: 0.0, 4: -0.4, 5: 0.2, 6: -0.1, 7: 0.5}

    def measure(decoder):
        if isinstance(decoder, Greedy):
            return [0.5, 0.7]
        assert decoder.gain == 2.0
        assert str(decoder.layers) == "1:"
        return [0.5 + worth[decoder.heads[0]], 0.7 + worth[decoder.heads[0]]]

    kinds = classify_heads(measure, vlm_of("llava"), method=ZeroTuning(layers="1:"))
    assert (kinds.up, kinds.down) == ((7, 0, 5, 2), (4, 1, 6))
    assert kinds.dominant == kinds.up
    with pytest.raises(UsageError, match=r"gain=0\.5"):
        classify_heads(measure, vlm_of("llava"), gain=0.5)


def searching(good, together=1.0):
    """A measure in which some heads are worth something alone, and a factor on that when there are several."""

    def measure(decoder):
        if isinstance(decoder, Greedy):
            return [0.0] * 4
        heads = read_heads(decoder.heads)
        worth = sum(good.get(pair, -0.1) for pair in heads) * (together if len(heads) > 1 else 1)
        return [worth + noise for noise in NOISE]

    return measure


def test_heads_that_are_certainly_better_off_are_kept():
    good = {(1, 2): 0.5, (2, 7): 0.4, (0, 0): 9.0, (1, 1): 0.05}  # the last is within the noise, layer 0 not searched
    found = search_heads(searching(good), vlm_of("llava"), method=ACT(heads="all", layers="1:"))
    assert found.heads == "L1H2/L2H7"
    assert ACT(heads=found.heads).heads == found.heads
    assert found.together.mean == pytest.approx(0.9)
    assert len(found.gains) == 16


def test_no_more_heads_are_kept_than_allowed():
    good = {(layer, head): 0.5 + 0.1 * head for layer in (1, 2) for head in range(8)}
    found = search_heads(searching(good), vlm_of("llava"), method=ACT(heads="all", layers="1:"), largest_share=0.1)
    assert found.heads == "L1H7/L2H7"


def test_heads_that_cancel_each_other_are_not_chosen():
    good = {(1, 2): 0.5, (2, 7): 0.4}
    found = search_heads(searching(good, together=-1.0), vlm_of("llava"), method=ACT(heads="all", layers="1:"))
    assert found.heads is None
    assert found.together.mean < 0
    nothing = search_heads(searching({}), vlm_of("llava"), method=ACT(heads="all", layers="1:"))
    assert (nothing.heads, nothing.together) == (None, None)


def test_a_measure_needs_two_samples_and_the_same_ones():
    with pytest.raises(UsageError, match="gave 1 numbers, and 1"):
        choose_gain(lambda decoder: [1.0])
    with pytest.raises(UsageError, match="gave 3 numbers, and 2"):
        choose_gain(lambda decoder: [0.0] * (2 + isinstance(decoder, ZeroTuning)))
