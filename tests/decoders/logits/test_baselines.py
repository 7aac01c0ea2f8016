"""APC, ICD, M3ID and FLB against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, plain, vlm_of
from vlmfix.decoders import APC, FLB, ICD, M3ID
from vlmfix.decoders.logits.flb import Boost
from vlmfix.decoders.logits.icd import BEFORE_QUESTION, SYSTEM
from vlmfix.decoders.logits.m3id import GrowingContrast, weight_at
from vlmfix.decoders.logits.plausibility import cut

EVERY = torch.ones(3, dtype=torch.bool)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_apc_is_the_cut_and_nothing_else():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    expected = plain(vlm, batch)
    close(logits(vlm, batch, APC(plausibility=0.9)), torch.stack([cut(one, one, 0.9) for one in expected]))
    assert logits(vlm, batch, APC(plausibility=0.9)).isinf().sum() > expected.isinf().sum()


@pytest.mark.parametrize(("place", "text"), [("system", SYSTEM), ("question", BEFORE_QUESTION)])
def test_icd_asks_the_same_question_under_the_instruction(place, text):
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?", "a dog?"], batch_of(vlm).pictures)
    method = ICD(place=place, contrast=1.5, plausibility=0)
    (branch,) = method.plan(vlm, batch, vlm.layout(batch)).contrasts[0].branches
    for ids, question in zip(branch.batch["input_ids"], batch.prompts, strict=True):
        words = vlm.processor.tokenizer.decode(ids)
        assert text in words
        assert question in words
    asked = [f"{text} {one}" for one in batch.prompts] if place == "question" else batch.prompts
    other = vlm.encode(asked, batch.pictures, system=text if place == "system" else None)
    clean, disturbed = plain(vlm, batch, steps=1), plain(vlm, other, steps=1)
    close(logits(vlm, batch, method, steps=1), 2.5 * clean - 1.5 * disturbed)


def test_icd_of_sid_has_half_the_contrast_behind_the_picture():
    assert (ICD(preset="sid-port").contrast, ICD(preset="sid-port").place) == (0.5, "question")


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 0.0), (1, 0.0202), (50, 1.718), (100, 6.389), (500, 22025.5), (10**6, math.inf)]
)
def test_the_weight_of_m3id_grows_with_the_answer(step, weight):
    assert weight_at(step, 0.02, math.inf) == pytest.approx(weight, rel=1e-3)
    assert weight_at(step, 0.02, 3.0) == pytest.approx(min(weight, 3.0), rel=1e-3)


@pytest.mark.parametrize("first", [0, 1])
def test_m3id_contrasts_log_probabilities_step_by_step(first):
    rule = GrowingContrast(
        branches=(), rows=EVERY, decay=0.3, plausibility=0.1, confidence=1, max_weight=math.inf, first_step=first
    )
    for step in range(first, first + 4):
        clean, text = drawn(2, 3, 30).double() * (step + 1)
        gamma = math.exp(-0.3 * step)
        c, u = clean.log_softmax(-1), text.log_softmax(-1)
        expected = cut(c, c + (1 - gamma) / gamma * (c - u), 0.1)
        close(rule.fuse(clean, text[None], clean).log_softmax(-1), expected.log_softmax(-1))


def test_m3id_leaves_a_row_that_is_sure():
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]])[:, None]
    rule = dict(branches=(), rows=EVERY[:1], decay=1.0, plausibility=0.0, confidence=0.9, max_weight=math.inf)
    other = torch.tensor([[[0.0, 3.0, 0.0]]])
    assert torch.equal(GrowingContrast(**rule).fuse(sure, other, sure), sure)
    assert not torch.equal(GrowingContrast(**rule).fuse(unsure, other, unsure), unsure)


def test_m3id_asks_without_the_picture():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    without = vlm.encode(batch.prompts, [[], []])
    clean, text = plain(vlm, batch, steps=1), plain(vlm, without, steps=1)
    found = logits(vlm, batch, M3ID(decay=0.5, plausibility=0), steps=1)
    close(found, clean + math.expm1(0.5) * (clean - text))


def test_flb_adds_the_first_logits_more_and_more():
    rule, first = Boost(branches=(), rows=EVERY, strength=0.3, decay=0.05, plausibility=0.1), None
    for step in range(5):
        clean = drawn(3, 30) * (step + 1)
        first = clean if first is None else first
        expected = cut(clean, clean + 0.3 * (1 - math.exp(-0.05 * step)) * first, 0.1)
        close(rule.fuse(clean, clean[None, :0], clean), expected)


def test_flb_keeps_the_first_logits_of_the_rows_that_go_on():
    rule, clean = Boost(branches=(), rows=EVERY, strength=0.3, decay=5.0, plausibility=0.0), drawn(3, 30)
    rule.fuse(clean, clean[None, :0], clean)
    kept = rule.keep(torch.tensor([2, 2, 0]))
    new = drawn(3, 30).flip(1)
    weight = 0.3 * (1 - math.exp(-5.0))
    close(kept.fuse(new, new[None, :0], new), new + weight * clean[[2, 2, 0]])


@pytest.mark.parametrize("name", ["flb", "m3id"])
def test_a_rule_that_counts_begins_anew(name):
    common = {"branches": (), "rows": EVERY, "decay": 0.5, "plausibility": 0.0}
    rule = (
        Boost(**common, strength=2.0)
        if name == "flb"
        else GrowingContrast(**common, confidence=1, max_weight=math.inf, first_step=1)
    )
    clean, other = drawn(2, 3, 30)
    first = rule.fuse(clean, other[None], clean)
    rule.fuse(other, clean[None], other)
    assert not torch.equal(rule.fuse(clean, other[None], clean), first)
    assert torch.equal(rule.begun().fuse(clean, other[None], clean), first)


def test_an_answer_of_one_token_by_flb_is_the_cut_alone():
    vlm = vlm_of("qwen2_5_vl")
    batch = batch_of(vlm)
    close(logits(vlm, batch, FLB(plausibility=0.5), steps=1), logits(vlm, batch, APC(plausibility=0.5), steps=1))
    assert (logits(vlm, batch, FLB(plausibility=0, strength=3, decay=1)) - plain(vlm, batch))[1:].abs().max() > 1e-2
