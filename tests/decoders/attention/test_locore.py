"""LocoRE against its specification's vectors and a slow version."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, plain, vlm_of
from vlmfix.attention.edit import LayerSet, Site
from vlmfix.decoders.attention.locore import LocalBias, LocalScores, LocalWeights, LocoRE
from vlmfix.errors import UsageError


def site(queries, *, keys, prompt, image=(), text=(), rows=1):
    """One row of batch whose picture and text stand at the given keys, in a pass over prompt and answer."""
    image_keys, text_keys = (torch.zeros(rows, keys, dtype=torch.bool) for _ in range(2))
    image_keys[:, list(image)] = True
    text_keys[:, list(text)] = True
    return Site(
        number=0,
        heads=2,
        tokens=prompt,
        prefill=True,
        queries=torch.tensor([queries]),
        allowed=torch.ones(1, 1, len(queries), keys, dtype=torch.bool),
        image_keys=image_keys,
        text_keys=text_keys,
        answer_keys=(torch.arange(keys) >= prompt)[None],
        acts=torch.ones(rows, len(queries), dtype=torch.bool),
        live=torch.arange(rows),
    )


def local(kind, *, gain=1.5, size=2, generated=False):
    return kind(gain=gain, size=size, generated=generated)


# Query 3 with keys 1 and 2 boosted: history starts after the picture at key 0.
HERE = site([3], keys=4, prompt=1, image=[0])
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4])[None, None, None]
SCORES = torch.tensor([-1.0, -2.0, 1.0, 0.5])[None, None, None]


def test_post_vector():
    got = local(LocalWeights).weights(HERE, WEIGHTS).flatten()
    torch.testing.assert_close(got, torch.tensor([0.1, 0.3, 0.45, 0.4]))
    assert got.sum().item() == pytest.approx(1.25)


def test_renorm_vectors():
    edit = local(LocalBias)
    from_weights = (WEIGHTS.log() + edit.bias(HERE)).softmax(-1).flatten()
    torch.testing.assert_close(from_weights, torch.tensor([0.08, 0.24, 0.36, 0.32]))
    from_scores = (SCORES + edit.bias(HERE)).softmax(-1).flatten()
    want = torch.tensor([0.05842, 0.03224, 0.64752, 0.26183])
    torch.testing.assert_close(from_scores, want, atol=1e-5, rtol=0)


def test_score_vector():
    got = local(LocalScores).scores(HERE, SCORES).softmax(-1).flatten()
    torch.testing.assert_close(got, torch.tensor([0.05618, 0.00760, 0.68443, 0.25179]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        SCORES.softmax(-1).flatten(), torch.tensor([0.07554, 0.02779, 0.55814, 0.33853]), atol=1e-5, rtol=0
    )


def test_score_mode_weakens_a_key_with_a_negative_score():
    assert local(LocalScores).scores(HERE, SCORES).softmax(-1)[..., 1] < SCORES.softmax(-1)[..., 1]


@pytest.mark.parametrize(("size", "boosted"), [(0, []), (1, [6]), (2, [5, 6]), (4, [3, 4, 5, 6]), (50, [3, 4, 5, 6])])
def test_the_window_ends_before_the_query_and_starts_after_the_picture(size, boosted):
    window = local(LocalBias, size=size).window(site([7], keys=9, prompt=5, image=[1, 2], text=[0, 3, 4]))
    assert window[0, 0, 0].nonzero().flatten().tolist() == boosted


def test_generated_scope_starts_at_the_first_generated_token():
    edit = local(LocalBias, size=5, generated=True)
    assert not edit.window(site([4], keys=5, prompt=5, image=[1, 2])).any()  # the last prompt row
    assert edit.window(site([7], keys=8, prompt=5, image=[1]))[0, 0, 0].nonzero().flatten().tolist() == [5, 6]


def test_without_a_picture_history_starts_at_the_first_real_token():
    window = local(LocalBias, size=50).window(site([6], keys=7, prompt=5, text=[2, 3, 4]))
    assert window[0, 0, 0].nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_window_odds_scale_by_the_gain_and_mass_stays_below_one():
    torch.manual_seed(0)
    scores = torch.randn(1, 1, 1, 9)
    here = site([8], keys=9, prompt=3, image=[0])
    inside = local(LocalBias, size=3).window(here)
    base = scores.softmax(-1)
    for gain in (1.5, 4.0):
        new = (scores + local(LocalBias, gain=gain, size=3).bias(here)).softmax(-1)
        mass, before = new[inside].sum(), base[inside].sum()
        torch.testing.assert_close(mass, before * gain / (1 + (gain - 1) * before))
        torch.testing.assert_close(new[inside] / mass, base[inside] / before)
        assert mass < 1


def test_presets_and_model_defaults():
    assert LocoRE().scope == "post_image"
    assert LocoRE(preset="semantic").scope == "generated"
    hook = LocoRE(preset="released-hook")
    assert (hook.mode, hook.layers) == ("score", LayerSet("9:15"))
    assert LocoRE(preset="semantic", mode="post").mode == "post"
    for family, gain in (("llava", 1.15), ("qwen2_vl", 1.2), ("internvl", 1.15)):
        vlm = vlm_of(family)
        batch = batch_of(vlm, [0])
        (edit,) = LocoRE().plan(vlm, batch, vlm.layout(batch)).edits
        assert edit.gain == pytest.approx(gain)
    with pytest.raises(UsageError, match="preset='paper'"):
        LocoRE(preset="paper")


def test_the_first_token_is_untouched_in_generated_scope():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    base = plain(vlm, batch)
    semantic = logits(vlm, batch, LocoRE(preset="semantic", strength=5.0))
    close(semantic[0], base[0])
    literal = logits(vlm, batch, LocoRE(strength=5.0))
    assert (literal[0] - base[0]).abs().max() > 1e-3
    assert (semantic[2] - base[2]).abs().max() > 1e-3


def test_a_zero_window_is_the_plain_model():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    close(logits(vlm, batch, LocoRE(strength=5.0, window=0)), plain(vlm, batch))


def test_renorm_is_the_logarithm_of_the_gain():
    assert local(LocalBias, gain=math.e).bias(HERE)[..., 1].item() == pytest.approx(1.0)
