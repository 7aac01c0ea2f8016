"""INTER against its specification's vectors and invariants."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, plain, vlm_of
from vlmfix.decoders import INTER
from vlmfix.decoders.logits.inter import Interaction

CLEAN = torch.tensor([[3.0, 4.0, 3.0, -6.0]])
PICTURE = torch.tensor([[1.0, 1.0, 1.0, -4.0]])
QUESTION = torch.tensor([[0.0, 5.0, 3.0, -6.0]])
NEITHER = torch.tensor([[1.0, 0.0, 0.0, -3.5]])


def rule(variance=1.0, plausibility=0.1, var_topk=None, rows=1):
    return Interaction(
        branches=(),
        rows=torch.ones(rows, dtype=torch.bool),
        variance=variance,
        plausibility=plausibility,
        var_topk=var_topk,
    )


def fuse(method, clean=CLEAN, question=QUESTION, picture=PICTURE, neither=NEITHER):
    return method.fuse(clean, torch.stack([question, picture, neither]), clean)


def test_golden_interaction():
    interaction, spread = rule().interaction(CLEAN, QUESTION, PICTURE, NEITHER)
    assert interaction.tolist() == [[3.0, -2.0, -1.0, 0.5]]
    assert spread.item() == pytest.approx(4.729167, abs=1e-6)


@pytest.mark.parametrize(
    ("k", "scores", "probabilities"),
    [
        (1.0, [6, 2, 2, -math.inf], [0.964664, 0.017668, 0.017668, 0]),
        (5.0, [3, 4, 3, -math.inf], [0.211942, 0.576117, 0.211942, 0]),
        (4.0, [6, 2, 2, -math.inf], [0.964664, 0.017668, 0.017668, 0]),  # off with the population variance
    ],
)
def test_golden_scores(k, scores, probabilities):
    got = fuse(rule(k))
    assert got.tolist() == [scores]
    torch.testing.assert_close(got.softmax(-1), torch.tensor([probabilities]), atol=1e-6, rtol=0)


def test_a_threshold_equal_to_the_variance_is_on():
    _, spread = rule().interaction(CLEAN, QUESTION, PICTURE, NEITHER)
    assert fuse(rule(spread.item()))[0, 0] == 6


def random_logits(seed=0, rows=3, vocabulary=30):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, vocabulary, generator=generator) * 3 for _ in range(4)]


def test_additive_blind_and_deaf_models_have_no_interaction():
    a, b, c, _ = random_logits()
    for clean, question, picture, neither in ((a + b + c, b + c, a + c, c), (a, a, b, b), (a, b, a, b)):
        interaction, spread = rule().interaction(clean, question, picture, neither)
        torch.testing.assert_close(interaction, torch.zeros_like(a), atol=1e-5, rtol=0)
        torch.testing.assert_close(spread, torch.zeros(3), atol=1e-9, rtol=0)


def test_efficiency_and_symmetry():
    clean, question, picture, neither = random_logits()
    interaction, spread = rule().interaction(clean, question, picture, neither)
    torch.testing.assert_close(neither + (picture - neither) + (question - neither) + interaction, clean)
    swapped, other = rule().interaction(clean, picture, question, neither)
    torch.testing.assert_close(swapped, interaction)
    torch.testing.assert_close(other, spread)


def test_constants_do_not_matter_and_scale_does():
    clean, question, picture, neither = random_logits()
    base = fuse(rule(2.0, rows=3), clean, question, picture, neither).softmax(-1)
    shifted = fuse(rule(2.0, rows=3), clean + 5, question - 3, picture + 1, neither + 2).softmax(-1)
    torch.testing.assert_close(shifted, base)
    _, spread = rule().interaction(clean, question, picture, neither)
    _, scaled = rule().interaction(2 * clean, 2 * question, 2 * picture, 2 * neither)
    torch.testing.assert_close(scaled, 4 * spread)


def test_infinite_threshold_leaves_the_cut():
    clean, question, picture, neither = random_logits()
    got = fuse(rule(math.inf, rows=3), clean, question, picture, neither)
    assert torch.equal(got.argmax(-1), clean.argmax(-1))
    probabilities = clean.softmax(-1)
    assert torch.equal(got.isfinite(), probabilities >= 0.1 * probabilities.max(-1, keepdim=True).values)
    assert torch.equal(fuse(rule(math.inf, 0.0, rows=3), clean, question, picture, neither), clean)


def test_rows_are_gated_alone():
    clean, question, picture, neither = random_logits(rows=2)
    question[0], picture[0], neither[0] = clean[0], clean[0], clean[0]
    got = fuse(rule(0.5, 0.0, rows=2), clean, question, picture, neither)
    assert torch.equal(got[0], clean[0])
    assert not torch.equal(got[1], clean[1])


def test_masked_entries_count_as_no_interaction():
    clean, question, picture, neither = random_logits(rows=1)
    want, spread = rule().interaction(clean, question, picture, neither)
    padded = [torch.cat([x, torch.full((1, 5), -math.inf)], dim=1) for x in (clean, question, picture, neither)]
    interaction, other = rule().interaction(*padded)
    torch.testing.assert_close(interaction[:, :30], want)
    assert (interaction[:, 30:] == 0).all()
    torch.testing.assert_close(other, spread)


def test_variance_over_the_best_tokens():
    clean, question, picture, neither = random_logits(rows=1)
    interaction, spread = rule(var_topk=7).interaction(clean, question, picture, neither)
    best = clean[0].topk(7).indices
    assert spread.item() == pytest.approx(interaction[0, best].var(unbiased=True).item(), rel=1e-5)


def test_one_token_has_no_variance():
    one = torch.zeros(1, 1)
    _, spread = rule().interaction(one + 3, one, one, one)
    assert spread.tolist() == [0.0]


def branches(vlm, batch, **options):
    plan = INTER(**options).plan(vlm, batch, vlm.layout(batch))
    return plan.contrasts[0].branches


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
def test_branches_mask_what_they_say(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    question, picture, neither = branches(vlm, batch)
    shown = vlm.layout(batch).tokens.sum()
    assert torch.equal(question.batch["input_ids"], batch["input_ids"])
    assert not torch.equal(question.batch["pixel_values"], batch["pixel_values"])
    assert picture.same_pictures
    assert torch.equal(picture.batch["pixel_values"], batch["pixel_values"])
    assert torch.equal(neither.batch["pixel_values"], question.batch["pixel_values"])
    assert torch.equal(neither.batch["input_ids"], picture.batch["input_ids"])
    assert vlm.layout(picture.batch).tokens.sum() == shown
    texts = vlm.processor.batch_decode(picture.batch["input_ids"])
    assert not any("what is here" in text or "dog" in text for text in texts)
    assert any("what is here" in text for text in vlm.processor.batch_decode(batch["input_ids"]))


@pytest.mark.parametrize("mask", ["uniform", "zeros", "mean", "gaussian"])
def test_ways_to_mask_a_picture(mask):
    for family in ("llava", "idefics3", "qwen2_vl"):
        vlm = vlm_of(family)
        batch = batch_of(vlm)
        pixels = branches(vlm, batch, mask_image=mask)[0].batch["pixel_values"]
        again = branches(vlm, batch, mask_image=mask)[0].batch["pixel_values"]
        assert torch.equal(pixels, again)
        assert pixels.shape == batch["pixel_values"].shape
        assert logits(vlm, batch, INTER(mask_image=mask, variance=0.0), steps=1).isfinite().any()
    llava = branches(vlm_of("llava"), batch_of(vlm_of("llava")), mask_image=mask)[0].batch["pixel_values"]
    if mask == "zeros":
        assert (llava == 0).all()
    elif mask == "mean":
        assert torch.allclose(llava.flatten(1).std(dim=1), torch.zeros(3), atol=1e-5)
    elif mask == "uniform":
        assert 0 <= llava.min() <= llava.max() < 1
    else:
        assert llava.min() < -2


def test_dropping_the_turns_text():
    vlm = vlm_of("qwen2_vl")
    batch = batch_of(vlm)
    assert logits(vlm, batch, INTER(mask_text="drop_turn", variance=0.0), steps=2).shape[0] == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_users_own_processor_output_works(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    close(logits(vlm, dict(batch), INTER(variance=0.0)), logits(vlm, batch, INTER(variance=0.0)))


def test_inputs_without_pictures_are_decoded_plainly():
    vlm = vlm_of("llava")
    batch = vlm.encode(["hello"], [[]])
    close(logits(vlm, batch, INTER(variance=0.0)), plain(vlm, batch))
