"""Saliency against its specification's vectors and against the full T x T computation on whole models."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from tests.contracts.support import batch_of, extended, plain, vlm_of
from tests.contracts.test_reference import Slow, installed, same
from tests.tiny import TINY
from vlmfix.attention.edit import LayerSet
from vlmfix.attention.saliency import after_picture, mean_over, row_saliency, scoring_layers, token_loss
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.running import running
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.generation import VLM
from vlmfix.models.layout import ImageLayout
from vlmfix.upstream.cache import keys_and_values

# Two heads, four keys, the row that predicts; only its last two rows have a gradient.
WEIGHTS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])[None]
GRADIENT = torch.tensor([[2.0, -1.0, 1.0, 0.5], [0.0, 2.0, -2.0, 4.0]])[None]
TOKENS = torch.tensor([[40, 50, 60], [70, 45, 33]])


def test_the_specifications_vector():
    saliency = row_saliency(WEIGHTS, GRADIENT)
    want = torch.tensor([[0.123797, 0.433289, 0.495188, 0.742781]])
    torch.testing.assert_close(saliency, want, atol=1e-6, rtol=0)
    assert mean_over(saliency[None], torch.tensor([[False, True, True, False]])).item() == pytest.approx(0.464238)
    assert mean_over(saliency[None], torch.tensor([[False, True, True, True]])).item() == pytest.approx(0.557086)
    assert mean_over(saliency[None], torch.zeros(1, 4, dtype=torch.bool)).isnan().all()


def test_neither_the_losss_scale_and_sign_nor_the_order_of_heads_matter():
    want = row_saliency(WEIGHTS, GRADIENT)
    torch.testing.assert_close(row_saliency(WEIGHTS, -37.0 * GRADIENT), want)
    torch.testing.assert_close(row_saliency(WEIGHTS.flip(1), GRADIENT.flip(1)), want)


def test_a_row_without_gradient_stays_zero_and_scores_stay_below_their_bound():
    assert row_saliency(WEIGHTS, torch.zeros_like(GRADIENT)).eq(0).all()
    torch.manual_seed(0)
    saliency = torch.stack([row_saliency(torch.rand(3, 2, 9).softmax(-1), torch.randn(3, 2, 9)) for _ in range(4)])
    torch.testing.assert_close(saliency.norm(dim=-1), torch.ones(4, 3))
    for count in (1, 4, 9):
        scores = mean_over(saliency, torch.arange(9).lt(count).expand(3, 9))
        assert (scores >= 0).all()
        assert (scores <= count**-0.5 + 1e-6).all()


def test_the_loss_of_a_certain_token_keeps_its_gradient():
    """Probability 1 - 1e-10 is 1 in float32; the gradient of the plain loss would lose its largest entry."""
    logits = torch.tensor([[23.0, 0.0, -1.0, -2.0]], requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    for token in range(4):
        loss = token_loss(logits, torch.tensor([token]))
        want = -exact.log_softmax(dim=-1)[:, token]
        torch.testing.assert_close(loss.double(), want)
        (got,), (gradient,) = torch.autograd.grad(loss, logits), torch.autograd.grad(want, exact)
        torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("count", "layers"), [(1, {0}), (3, {0}), (8, {1, 2}), (9, {6, 7, 8}), (32, {6, 7, 8})])
def test_layers_of_the_score(count, layers):
    assert scoring_layers(count).resolve(count) == layers


def test_history_begins_behind_the_last_picture_of_each_row():
    tokens = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    text = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    layout = ImageLayout(tokens, text, tokens.long() - 1, torch.zeros(2, 6, 4))
    assert after_picture(layout).tolist() == [5, 2]


@contextmanager
def asked(vlm, batch, layers="all"):
    """A call whose newest step may be asked."""
    plan = DecodingPlan(asks=LayerSet(layers))
    with running(vlm, batch, vlm.layout(batch), plan, limit=4, name="saliency") as call:
        yield call


def fast(vlm, batch, layers="all", tokens=TOKENS):
    """[(logits, saliency)] of every forced token."""
    found = []
    with asked(vlm, batch, layers) as call:
        logits = call.prompt()
        for place, column in enumerate(tokens.T):
            found.append((logits, call.owed.saliency(column)))
            if place + 1 < tokens.shape[1]:
                logits = call.token(column)
    return found


class Graph(Slow):
    """The slow attention of the reference tests, which keeps every layer's whole attention in the graph."""

    def __init__(self):
        super().__init__(same, same)
        self.attention = {}

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        _, heads, length, _ = query.shape
        key, value = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        scores = query.double() @ key.transpose(2, 3) * scaling
        allowed = torch.ones(length, length, dtype=torch.bool).tril() if attention_mask is None else attention_mask
        weights = scores.masked_fill(~allowed, -1e300).softmax(-1) * allowed
        self.attention[module.layer_idx] = weights
        return (weights @ value).transpose(1, 2).to(query.dtype).contiguous(), None


def slow(vlm, batch, *, append=False):
    """Steps 1 to 6 of the specification: a full forward pass per token, and the gradient of all rows.

    Args:
        append: The judged token stands behind the prefix, as in the released script.
    """

    found, graph = [], Graph()
    with installed(vlm, graph):
        for place, column in enumerate(TOKENS.T):
            said = TOKENS[:, : place + 1 if append else place]
            with torch.enable_grad():
                inputs = extended(batch, said)
                logits = vlm.model(**inputs, use_cache=False).logits[:, -2 if append else -1]
                loss = torch.nn.functional.cross_entropy(logits.double(), column, reduction="sum")
                layers = [graph.attention[layer] for layer in sorted(graph.attention)]
                gradients = torch.autograd.grad(loss, layers)
            matrices = [(a * g).abs().tril().sum(dim=1) for a, g in zip(layers, gradients, strict=True)]
            rows = torch.stack([m / m.norm(dim=-1, keepdim=True).clamp(min=1e-9) for m in matrices])
            found.append((logits.detach(), rows.detach()))  # (L, B, K, K)
    return found


@pytest.mark.parametrize("family", TINY)
def test_a_cached_row_equals_the_full_computation(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    for (logits, saliency), (want, full) in zip(fast(vlm, batch), slow(vlm, batch), strict=True):
        torch.testing.assert_close(logits, want.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(saliency.double(), full[:, :, -1], atol=1e-4, rtol=0)
        assert saliency.std() > 0.01


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_row_of_the_judged_token_itself_has_no_gradient(family):
    """The released script reads it: all its scores are exactly zero."""
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    for (_, prefix), (_, appended) in zip(slow(vlm, batch), slow(vlm, batch, append=True), strict=True):
        assert appended[:, :, -1].eq(0).all()
        torch.testing.assert_close(appended[:, :, :-1, :-1], prefix, atol=1e-5, rtol=0)
        assert appended[-1, :, :-2].eq(0).all()  # in the last layer only the predicting row counts
        assert appended[:, :, -2].sum() > 1


def test_different_candidates_get_different_rows_and_only_where_wanted():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)

    with asked(vlm, batch, "1:") as call:
        call.prompt()
        one, other = (call.owed.saliency(torch.tensor([token, token])) for token in (40, 50))
        half = call.owed.saliency(torch.tensor([40, 50]), torch.tensor([True, False]))
        assert (one - other).abs().max() > 1e-3
        torch.testing.assert_close(half[:, 0], one[:, 0])
        assert half[:, 1].eq(0).all()
        assert call.owed.keys == batch.length


def test_nothing_is_left_behind_and_memory_is_one_row_per_layer():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    for parameter in vlm.model.parameters():
        parameter.requires_grad_(False)
    try:
        frozen = fast(vlm, batch)
    finally:
        for parameter in vlm.model.parameters():
            parameter.requires_grad_(True)

    with asked(vlm, batch, "1:") as call:
        logits, seen = call.prompt(), call.owed.recorder.seen
        saliency = call.owed.saliency(TOKENS[:, 0])
        assert sorted(seen) == [1, 2]
        assert all(node.shape == (2, 8, 1, batch.length) for node in seen.values())
        assert seen[1].is_leaf  # the layer before has no graph
        assert not seen[2].is_leaf
        assert not saliency.requires_grad
        assert not logits.requires_grad
        assert not any(x.requires_grad for pair in keys_and_values(call.cache) for x in pair)
    assert not seen
    torch.testing.assert_close(saliency, frozen[0][1][1:])
    assert all(parameter.grad is None for parameter in vlm.model.parameters())
    assert not hasattr(vlm.family.attention_modules(vlm.model)[1], "_vlmfix_plan")
    torch.testing.assert_close(plain(vlm, batch)[0], frozen[0][0], atol=1e-4, rtol=1e-4)


def test_layers_that_the_model_lacks_are_refused():
    vlm = vlm_of("llava")
    with pytest.raises(UnsupportedAttentionError, match="the model has 3 layers"):
        fast(vlm, batch_of(vlm), layers="6:9")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(family, dtype):
    exact = vlm_of(family)
    rounded = VLM(copy.deepcopy(exact.model).to(dtype), exact.processor, exact.family)
    for (_, got), (_, want) in zip(fast(rounded, batch_of(rounded)), fast(exact, batch_of(exact)), strict=True):
        assert torch.cosine_similarity(got, want, dim=-1).min() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
@pytest.mark.parametrize(("dtype", "likeness"), [(torch.float32, 0.9999), (torch.bfloat16, 0.99)])
def test_a_gpu_gives_the_cpus_rows(family, dtype, likeness):
    here = vlm_of(family)
    there = VLM(copy.deepcopy(here.model).to("cuda", dtype), here.processor, here.family)
    found = fast(there, batch_of(there), tokens=TOKENS.cuda())
    for (_, got), (_, want) in zip(found, fast(here, batch_of(here)), strict=True):
        assert torch.cosine_similarity(got.cpu(), want, dim=-1).min() > likeness
