"""DoLa and DeCo against the slow way of their formulas, from the hidden states that transformers returns."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import batch_of, close, extended, logits, vlm_of
from vlmfix.decoders import DeCo, DoLa
from vlmfix.decoders.logits.deco import candidates
from vlmfix.decoders.logits.dola import distances, is_tied
from vlmfix.decoders.logits.plausibility import cut

STEPS = 3


@torch.no_grad()
def early(vlm, row, tokens, layers, *, normed):
    """Of one row without a cache: (steps, V) logits, and (E, steps, V) of early layers, float64."""
    batch = batch_of(vlm, [row])
    output = vlm.model(**extended(batch, tokens), use_cache=False, output_hidden_states=True)
    decoder, head = vlm.family.decoder(vlm.model), vlm.model.get_output_embeddings()
    states = [output.hidden_states[layer][0, batch.length - 1 :] for layer in layers]
    found = torch.stack([head(decoder.norm(state) if normed else state) for state in states])
    return output.logits[0, batch.length - 1 :].double(), found.double()


def both(vlm, method, formula, layers, *, normed):
    """Compares a batch of two rows with each row's slow way, step by step."""
    found = logits(vlm, batch_of(vlm), method, steps=STEPS)  # (steps, B, V)
    said = found.clone()
    said[..., vlm.family.image_token(vlm.model.config)] = -torch.inf
    for row in (0, 1):
        tokens = said[:-1, row].argmax(dim=-1)[None]
        last, others = early(vlm, row, tokens, layers, normed=normed)
        expected = torch.stack([formula(last[step], others[:, step]) for step in range(STEPS)])
        close(found[:, row].log_softmax(-1), expected.log_softmax(-1).float())


def divergence(p, q):
    middle = (p + q) / 2
    return sum(float((x * (x / middle).log()).sum()) for x in (p, q)) / 2


def released(p, q):
    middle = (p + q) / 2
    return sum(float((middle * (middle / x).log()).mean()) for x in (p, q)) / 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("distance", "measure"), [("divergence", divergence), ("official-code", released)])
def test_dola_subtracts_the_layer_that_is_furthest(family, distance, measure):
    def formula(last, others):
        q = last.softmax(-1)
        far = max(others, key=lambda one: measure(q, one.softmax(-1)))
        return cut(last, last.log_softmax(-1) - far.log_softmax(-1), 0.3)

    method = DoLa(layers="0:", plausibility=0.3, distance=distance)
    both(vlm_of(family), method, formula, (0, 1, 2), normed=False)


def test_both_distances_rank_layers_differently():
    last = torch.tensor([[0.7, 0.2, 0.05, 0.05]]).log()
    early = torch.tensor([[0.05, 0.15, 0.4, 0.4], [0.9999, 5e-5, 2.5e-5, 2.5e-5]])[:, None].log()
    true, code = (distances(last, early, swapped=swapped)[:, 0] for swapped in (False, True))
    for found, measure in ((true, divergence), (code, released)):
        expected = [measure(last[0].exp().double(), other[0].exp().double()) for other in early]
        torch.testing.assert_close(found, torch.tensor(expected).float())
    assert true.argmax() != code.argmax()


@pytest.mark.parametrize(("swapped", "measure"), [(False, divergence), (True, released)])
def test_a_token_that_float32_gives_no_probability_is_no_nan(swapped, measure):
    """Heads on streams that no norm has seen make logits far apart."""
    last = torch.tensor([[0.0, -150.0, -3.0]]).log_softmax(-1)
    early = torch.tensor([[[-2.0, -170.0, 0.0]], [[0.0, -120.0, -1.0]]]).log_softmax(-1)
    found = distances(last, early, swapped=swapped)[:, 0]
    expected = [measure(last[0].double().exp(), one[0].double().exp()) for one in early]
    torch.testing.assert_close(found, torch.tensor(expected).float())


@pytest.mark.parametrize(
    ("preset", "layers", "tied", "expected"),
    [
        ("low", 5, True, range(2, 3)),
        ("low", 4, True, range(2, 3)),
        ("low", 2, True, range(1, 2)),
        ("low", 1, True, range(0, 1)),
        ("low", 32, False, range(0, 16, 2)),
        ("high", 32, False, range(16, 32, 2)),
        ("low", 28, True, range(2, 14, 2)),
        ("low", 48, False, range(0, 20, 2)),
        ("high", 48, False, range(28, 48, 2)),
    ],
)
def test_the_buckets(preset, layers, tied, expected, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setattr(type(vlm), "layers", layers)
    monkeypatch.setattr("vlmfix.decoders.logits.dola.is_tied", lambda vlm: tied)
    assert DoLa(preset=preset).bucket(vlm) == list(expected)


def test_a_tied_head_is_known_by_its_weights(monkeypatch):
    vlm = vlm_of("llava")
    assert not is_tied(vlm)
    monkeypatch.setattr(vlm.model, "get_output_embeddings", vlm.model.get_input_embeddings)
    assert is_tied(vlm)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_deco_adds_the_layer_that_is_surest_of_a_candidate(family):
    def formula(last, others):
        order = last.softmax(-1).sort(descending=True).indices[:12].tolist()
        kept, total = [], 0.0
        for token in order:
            if total >= 0.6:
                break
            kept.append(token)
            total += float(last.softmax(-1)[token])
        best = max(((float(one.softmax(-1)[token]), number) for number, one in enumerate(others) for token in kept))
        new = torch.full_like(last, -torch.inf)
        new[kept] = (last + 1.5 * best[0] * others[best[1]])[kept]
        return new

    method = DeCo(strength=1.5, layers="1:", nucleus=0.6, candidates=12)
    both(vlm_of(family), method, formula, (1, 2), normed=True)


@pytest.mark.parametrize(("layers", "expected"), [(32, range(20, 29)), (28, range(18, 25)), (3, range(2, 3))])
def test_the_layers_of_deco_scale_with_the_depth(layers, expected, monkeypatch):
    monkeypatch.setattr(type(vlm_of("llava")), "layers", layers)
    assert DeCo().places(vlm_of("llava")) == list(expected)


def test_the_token_that_crosses_the_nucleus_is_a_candidate():
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for nucleus, count in ((0.0, 1), (0.5, 1), (0.6, 2), (0.8, 2), (0.81, 3), (1.0, 4)):
        assert int(candidates(shares.log(), nucleus, 20).sum()) == count
    assert int(candidates(shares.log(), 1.0, 2).sum()) == 2
