"""SPIN against its specification's invariants and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from tests.contracts.support import batch_of, close, logits, plain, vlm_of
from tests.decoders.attention.test_locore import site
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import SPIN
from vlmfix.decoders.attention.spin import ELSEWHERE, ByAttention, ByScores, kept_heads

HERE = site([4], keys=5, prompt=5, image=[1, 2], text=[0, 3, 4])
SCORES = torch.tensor([[5.0, -1.0, -1.0, 0.0, 0.0], [0.0, 1.0, -2.0, -9.0, -9.0]])[None, :, None]  # (1, 2, 1, 5)


def test_the_head_that_looks_least_is_turned_down():
    weights = torch.tensor([[0.2, 0.1, 0.3, 0.2, 0.2], [0.1, 0.25, 0.25, 0.2, 0.2]])[None, :, None]
    got = ByAttention(share=0.5, factor=0.1).weights(HERE, weights)
    torch.testing.assert_close(got[0, 0], 0.1 * weights[0, 0])
    assert torch.equal(got[0, 1], weights[0, 1])


def test_scores_and_weights_rank_differently():
    """The first head's scores on the picture sum to -2, the second's to -1; after the softmax it is 0.005 and 0.53."""
    weights = SCORES.softmax(-1)
    other = SCORES + torch.tensor([10.0, 0.0])[None, :, None, None]  # the softmax does not see it, the scores do
    for scores, least in ((SCORES, 0), (other, 1)):
        edit = ByScores(share=0.5, factor=0.0)
        assert edit.scores(HERE, scores) is scores
        assert (edit.weights(HERE, weights).sum(-1).flatten() == 0).tolist() == [least == 0, least == 1]
        assert not HERE.memory.of_rows
    by_attention = ByAttention(share=0.5, factor=0.0).weights(HERE, weights)
    assert (by_attention.sum(-1).flatten() == 0).tolist() == [True, False]


def test_every_query_has_its_own_ranking():
    here = site([3, 4], keys=5, prompt=3, image=[1], text=[0, 2])
    weights = torch.full((1, 2, 2, 5), 0.1)
    weights[0, 0, 0, 1] = weights[0, 1, 1, 1] = 0.6
    got = ByAttention(share=0.5, factor=0.0).weights(here, weights).sum(-1)[0] > 0
    assert got.tolist() == [[True, False], [False, True]]


def test_a_row_without_a_picture_keeps_its_heads():
    here = site([4], keys=5, prompt=5, text=[0, 1, 2, 3, 4])
    weights = SCORES.softmax(-1)
    assert torch.equal(ByAttention(share=0.0, factor=0.0).weights(here, weights), weights)


@pytest.mark.parametrize(
    ("share", "heads", "kept"), [(0.95, 32, 30), (0.7, 10, 7), (0.8, 40, 32), (1.0, 8, 8), (0.0, 8, 0), (0.29, 100, 29)]
)
def test_the_number_of_kept_heads_is_rounded_down(share, heads, kept):
    assert kept_heads(share, heads) == kept


def test_equal_heads_are_kept_from_the_first():
    got = ByAttention(share=0.5, factor=0.0).weights(replace(HERE, heads=8), torch.full((1, 8, 1, 5), 0.2))
    assert (got.sum(-1).flatten() > 0).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("preset", ["paper", "official-code"])
def test_silencing_every_head_leaves_attention_its_bias(preset):
    """In the one edited layer, the attention block's output at the last row is the projection's bias: none here."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    outputs = []
    handle = vlm.family.attention_modules(vlm.model)[1].register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    try:
        with SPIN(preset=preset, kept_share=0, suppression=0, layers="1").applied(vlm, batch):
            vlm.model(**batch)
    finally:
        handle.remove()
    assert (outputs[0][:, -1] == 0).all()
    assert (outputs[0][1, :-1].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("preset", ["paper", "official-code"])
@pytest.mark.parametrize("neutral", [{"kept_share": 1.0}, {"suppression": 1.0}])
def test_keeping_all_heads_is_the_plain_model(preset, neutral):
    vlm = vlm_of("qwen2_5_vl")
    batch = batch_of(vlm)
    close(logits(vlm, batch, SPIN(preset=preset, **neutral)), plain(vlm, batch))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_key_value_heads=32), (0.95, 0.08, LayerSet("all"))),
        (LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_key_value_heads=40), (0.9, 0.0, LayerSet("0:20"))),
        (LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_key_value_heads=8), ELSEWHERE),
    ],
)
def test_what_is_not_given_is_the_authors_for_the_model(text, expected, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setattr(type(vlm.model.config), "get_text_config", lambda self: text)
    assert SPIN().settings(vlm) == expected
    given = SPIN(kept_share=0.5, suppression=0.2, layers="3:5").settings(vlm)
    assert given == (0.5, 0.2, LayerSet("3:5"))
