"""VCD against its specification."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, plain, vlm_of
from vlmfix.decoders import VCD
from vlmfix.decoders.logits.noise import row_noise
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoders.logits.vcd import ImageContrast, kept_signal, noised


@pytest.mark.parametrize(("step", "value"), [(0, 0.999978), (100, 0.996589), (500, 0.744799), (999, 0.081249)])
def test_the_schedule(step, value):
    assert kept_signal(step) == pytest.approx(value, abs=1e-6)


def rule(contrast, plausibility):
    return ImageContrast(
        branches=(), rows=torch.ones(1, dtype=torch.bool), contrast=contrast, plausibility=plausibility
    )


def test_the_formula():
    clean, other = torch.tensor([[2.0, 1.0, -5.0]]), torch.tensor([[1.0, 1.5, -9.0]])
    got = rule(1.0, 0.1).fuse(clean, other[None], clean)
    assert got.tolist() == [[3.0, 0.5, -math.inf]]
    assert rule(1.0, 0.0).fuse(clean, other[None], clean).tolist() == [[3.0, 0.5, -1.0]]


def test_identical_branches_keep_the_ranking():
    torch.manual_seed(0)
    clean = torch.randn(4, 50)
    got = rule(3.0, 0.0).fuse(clean, clean[None], clean)
    torch.testing.assert_close(got, clean)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_cut_is_a_share_of_the_best_probability(share):
    torch.manual_seed(1)
    clean, scores = torch.randn(5, 40) * 3, torch.randn(5, 40)
    probabilities = clean.double().softmax(-1)
    kept = probabilities >= share * probabilities.max(-1, keepdim=True).values * (1 - 1e-6)
    got = cut(clean, scores, share)
    assert torch.equal(got.isfinite(), kept)
    torch.testing.assert_close(got[kept], scores[kept])
    torch.testing.assert_close(cut(clean.log_softmax(-1), scores, share), got)  # logits or log-probabilities


def test_noise_depends_on_the_picture_alone():
    torch.manual_seed(2)
    pixels = torch.randn(3, 3, 8, 8)
    rows = torch.tensor([0, 1, 2])
    together = noised(pixels, rows, 500, 7)
    swapped = noised(pixels.flip(0), rows, 500, 7).flip(0)
    torch.testing.assert_close(together, swapped, atol=0, rtol=0)
    alone = noised(pixels[1:2], torch.tensor([0]), 500, 7)
    torch.testing.assert_close(together[1:2], alone, atol=0, rtol=0)
    assert not torch.equal(noised(pixels, rows, 500, 8), together)
    shared = noised(pixels, torch.tensor([0, 0, 1]), 500, 7)
    assert not torch.equal(shared[0] - pixels[0], shared[1] - pixels[1])


def test_noise_does_not_depend_on_the_precision():
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    rows = torch.tensor([0, 1])
    exact, rounded = (row_noise(p, rows, 1, uniform=False) for p in (pixels, pixels.bfloat16()))
    assert torch.equal(exact, rounded)


def test_noise_has_the_schedules_variance():
    pixels = torch.zeros(1, 3, 100, 100)
    got = noised(pixels, torch.tensor([0]), 500, 0)
    assert got.std().item() == pytest.approx(math.sqrt(1 - kept_signal(500)), rel=0.02)
    signal = noised(torch.ones(1, 3, 100, 100), torch.tensor([0]), 500, 0)
    assert signal.mean().item() == pytest.approx(math.sqrt(kept_signal(500)), rel=0.02)


def test_uniform_noise_fills_the_unit_interval():
    noise = row_noise(torch.zeros(2, 3, 50, 50), torch.tensor([0, 1]), 3, uniform=True)
    assert 0 <= noise.min() < 0.01
    assert 0.99 < noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)


def test_presets():
    assert (VCD().contrast, VCD().plausibility, VCD().noise_step) == (1.0, 0.1, 500)
    assert VCD(preset="official-code").plausibility == 0.2
    assert VCD(preset="official-code", plausibility=0.3).plausibility == 0.3


def test_no_noise_gives_the_plain_ranking():
    """At step 0 the noised picture is the picture but for 0.5 % noise: contrast all but vanishes."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    base = plain(vlm, batch, steps=1)
    slight = logits(vlm, batch, VCD(noise_step=0, plausibility=0.0), steps=1)
    strong = logits(vlm, batch, VCD(noise_step=999, plausibility=0.0), steps=1)
    assert (slight - base).abs().max() < 0.2 * (strong - base).abs().max()


def test_inputs_without_pictures_are_decoded_plainly():
    vlm = vlm_of("llava")
    batch = vlm.encode(["hello"], [[]])
    close(logits(vlm, batch, VCD()), plain(vlm, batch))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_a_users_own_processor_output_works(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    close(logits(vlm, dict(batch), VCD()), logits(vlm, batch, VCD()))


def test_rows_that_the_noise_hardly_changes_add_the_noised_logits_for_their_whole_answer():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    strong = {"contrast": 1.5, "plausibility": 0.0}
    (rule,) = VCD(agreement=1.0, **strong).plan(vlm, batch, vlm.layout(batch)).contrasts
    clean, other = plain(vlm, batch, steps=1)[0], plain(vlm, rule.branches[0].batch, steps=1)[0]
    one, two = (part.double().softmax(-1) for part in (clean, other))
    middle = (one + two) / 2
    apart = ((one * (one / middle).log()).sum(-1) + (two * (two / middle).log()).sum(-1)) / 2
    nearer = int(apart.argmin())
    between = float(apart.mean())
    added, subtracted = clean + 4 * other, clean + 1.5 * (clean - other)
    expected = torch.stack([added[row] if row == nearer else subtracted[row] for row in range(2)])
    close(logits(vlm, batch, VCD(agreement=between, **strong), steps=1)[0], expected)
    close(logits(vlm, batch, VCD(agreement=1e-9, **strong)), logits(vlm, batch, VCD(**strong)))
    assert "agreement" not in VCD(**strong).spec()
    assert VCD(agreement=between).spec().count("complement=4") == 1
