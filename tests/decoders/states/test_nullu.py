"""Nullu against the slow way: one sample in float64 without a cache, MLPs whose last weights are projected."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, STRONG, Forced, batch_of, close, extended, logits, plain, vlm_of
from tests.decoding.again import recording_on_cpu
from tests.decoding.test_graphs import scores
from vlmfix.decoders import Nullu, parse
from vlmfix.decoders.states.directed import directions_for
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.folding import remove

STEPS = 4


@torch.no_grad()
def slow(vlm, row, tokens, rank, layers):
    """(steps, V) scores of one sample behind its prompt and each of ``tokens`` but the last."""
    model = copy.deepcopy(vlm.model).double()
    vectors = directions_for(vlm, "nullu", None).tensors["vectors"].double()
    for number in layers:
        weight = vlm.family.layers(model)[number].mlp.down_proj.weight
        keeps = torch.eye(len(weight), dtype=torch.float64)
        for vector in vectors[number, :rank]:
            keeps = keeps - torch.outer(vector, vector)
        weight.copy_(keeps @ weight)
    shown = vlm.encode([PROMPTS[row]], [PICTURES[row]])
    given = extended(shown, tokens[None, :-1])
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    return model(**given, use_cache=False).logits[0, shown.length - 1 :]


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


@pytest.fixture
def recording():
    with recording_on_cpu([vlm_of("llava")]) as made:
        yield made


def test_recorded_steps_give_the_scores_of_others(recording, monkeypatch):
    vlm, method = vlm_of("llava"), parse(f"{STRONG['nullu']}+vcd:plausibility=0")
    for shown in ((0, 1, 0, 1), (1, 1, 1, 1)):
        recorded, others = (scores(vlm, method, monkeypatch, recorded=yes, shown=shown) for yes in (True, False))
        for one, other in zip(recorded, others, strict=True):
            close(one, other, 1e-3)
    assert len(recording) == 2


def test_contrast_rows_and_samples_without_a_picture_are_left_alone():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?", "hello there"], [PICTURES[0], ()])
    close(logits(vlm, batch, STRONG["nullu"])[:, 1], plain(vlm, batch)[:, 1])
    tokens = torch.arange(20, 26).view(2, 3)

    def said(spec):
        return logits(vlm, batch, spec, logits_processor=[Forced(tokens, batch.length)])[:, 0]

    vcd = "vcd:contrast=1,plausibility=0"
    noisy = 2 * said("greedy") - said(vcd)
    close(said(f"{STRONG['nullu']}+{vcd}"), 2 * said(STRONG["nullu"]) - noisy, 1e-3)


def test_more_directions_than_were_measured_are_refused():
    vlm = vlm_of("llava")
    assert Nullu(rank=6).check(vlm) == "5 directions of each layer were measured, and not 6"
    with pytest.raises(IncompatibleDecodersError, match="5 directions of each layer were measured"):
        Nullu(rank=6).removed(vlm)
    assert "vlmfix profile --model llava --directions nullu" in Nullu(profile="no/file").check(vlm)
    assert Nullu().facts(vlm)["directions"] == "nullu in directions.safetensors"


def test_presets_and_layers_are_the_authors():
    assert (Nullu().rank, Nullu(preset="official-code").rank) == (4, 8)
    deep = type("Deep", (), {"layers": 32})()
    assert Nullu()._layers(deep).resolve(32) == frozenset(range(16, 32))
