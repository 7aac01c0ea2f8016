"""Nullu against the slow way: one sample in float64 without a cache, MLPs whose last weights are projected."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, Forced, batch_of, close, logits, plain, vlm_of
from tests.decoders.whole import in_float64
from vlmfix.decoders import Nullu, parse
from vlmfix.decoders.states.directed import directions_for
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.folding import remove

STEPS = 4


def slow(vlm, row, tokens, rank, layers):
    """(steps, V) scores of one sample behind its prompt and each of ``tokens`` but the last."""
    vectors = directions_for(vlm, "nullu", None).tensors["vectors"].double()

    def project(exact):
        for number in layers:
            weight = exact.family.layers(exact.model)[number].mlp.down_proj.weight
            keeps = torch.eye(len(weight), dtype=torch.float64)
            for vector in vectors[number, :rank]:
                keeps = keeps - torch.outer(vector, vector)
            weight.copy_(keeps @ weight)

    return in_float64(vlm, vlm.encode([PROMPTS[row]], [PICTURES[row]]), tokens, project)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_mlps_add_loses_the_directions(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm, (0, 1, 1))
    tokens = torch.arange(20, 20 + 3 * STEPS).view(3, STEPS)
    method = Nullu(rank=3, layers="1:")
    found = logits(vlm, batch, method, steps=STEPS, logits_processor=[Forced(tokens, batch.length)])
    for sample, row in enumerate((0, 1, 1)):
        close(found[:, sample], slow(vlm, row, tokens[sample], 3, (1, 2)))
    for other in ((2, (1, 2)), (3, (0, 1, 2))):
        assert (found[:, 0] - slow(vlm, 0, tokens[0], *other)).abs().max() > 1e-2


def test_taking_directions_out_twice_changes_nothing_more():
    vlm = vlm_of("llava")
    own = type(vlm)(model=copy.deepcopy(vlm.model), processor=vlm.processor, family=vlm.family)
    removed = Nullu(rank=5, layers="all").removed(vlm)
    assert {layer: [len(part) for part in parts] for layer, parts in removed.items()} == {0: [5], 1: [5], 2: [5]}
    both = parse("nullu:rank=2,layers=1+nullu:rank=1,layers=1:").removed(vlm)
    assert {layer: [len(part) for part in parts] for layer, parts in both.items()} == {1: [2, 1], 2: [1]}
    assert Nullu(rank=0).removed(vlm) == {}
    remove(own, removed)
    once = plain(own, batch_of(vlm))
    close(once, logits(vlm, batch_of(vlm), "nullu:rank=5,layers=all"))
    remove(own, removed)
    close(plain(own, batch_of(vlm)), once)


def test_more_directions_than_were_measured_are_refused():
    vlm = vlm_of("llava")
    assert Nullu(rank=6).check(vlm) == "5 directions of each layer were measured, and not 6"
    with pytest.raises(IncompatibleDecodersError, match="5 directions of each layer were measured"):
        Nullu(rank=6).removed(vlm)


def test_presets_and_layers_are_the_authors():
    assert (Nullu().rank, Nullu(preset="official-code").rank) == (4, 8)
    deep = type("Deep", (), {"layers": 32})()
    assert Nullu()._layers(deep).resolve(32) == frozenset(range(16, 32))
