"""Amplify: which heads a profile gives it, what it makes of them, and what can be folded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.contracts.support import PICTURES, batch_of, close, logits, plain, vlm_of
from tests.heads.made import made_profile
from vlmfix.decoders import Amplify, parse
from vlmfix.decoders.attention.amplify import Blend, Scaling
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.heads.profile import save_profiles

HEADS = "L0H2/L1H0/L2H5"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A file with a made-up patching profile of the tiny LLaVA, whose middle layer is layer 1."""
    scores = -torch.arange(24.0).view(3, 8)
    scores[1, 7] = 99.0  # a memory head
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    save_profiles({"patching": made_profile(vlm_of("llava"), "patching", scores)}, path)
    return str(path)


def test_the_strongest_context_heads_of_the_middle_layers_are_taken(profiled):
    vlm = vlm_of("llava")
    assert Amplify(profile=profiled).chosen(vlm) == ((1, 6), (1, 5), (1, 4), (1, 3))
    assert len(Amplify(profile=profiled, count=24).chosen(vlm)) == 7  # a memory head is none of them
    facts = Amplify(profile=profiled, count=2).facts(vlm)
    assert (facts["heads"], facts["profile"]) == ("L1H6/L1H5", "patching in heads.safetensors")
    assert parse(f"amplify:heads={HEADS}").facts(vlm) == {}
    batch = batch_of(vlm)
    given = logits(vlm, batch, parse("amplify:heads=L1H6/L1H5"))
    assert torch.equal(logits(vlm, batch, Amplify(profile=profiled, count=2)), given)


def test_edits_are_made_for_what_does_something_alone():
    vlm = vlm_of("qwen2_vl")
    batch = batch_of(vlm)

    def kinds(decoder):
        return [(type(edit), str(edit.layers)) for edit in decoder.plan(vlm, batch, vlm.layout(batch)).edits]

    decoder = parse(f"amplify:heads={HEADS},by=0")
    assert kinds(decoder) == [(Scaling, "0/1/2")]
    assert kinds(replace(decoder, identity=0.5)) == [(Blend, "0/1/2"), (Scaling, "0/1/2")]
    assert kinds(replace(decoder, identity=0.5, by=1)) == [(Blend, "0/1/2")]
    blind = vlm.encode(["hello"], [()])
    assert decoder.plan(vlm, blind, vlm.layout(blind)).edits == ()


def test_a_row_without_a_picture_keeps_its_heads():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here, and where?", "hello there"], [PICTURES[0], ()])
    found = logits(vlm, batch, parse(f"amplify:heads={HEADS},by=4,identity=0.7"))
    close(found[:, 1], plain(vlm, batch)[:, 1])
    assert (found[:, 0] - plain(vlm, batch)[:, 0]).abs().max() > 1e-2


def test_heads_times_zero_are_pruned_heads_and_fold_as_such():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    close(logits(vlm, batch, parse(f"amplify:heads={HEADS},by=0")), logits(vlm, batch, parse(f"ph3:heads={HEADS}")))
    factors = parse("amplify:heads=L0H2/L0H3,by=1.5").folded(vlm)
    assert {layer: row.tolist() for layer, row in factors.items()} == {0: [1, 1, 1.5, 1.5, 1, 1, 1, 1]}
    with pytest.raises(IncompatibleDecodersError, match="acts on attention"):
        parse("amplify:heads=L0H2,identity=0.5").folded(vlm)


def test_what_it_cannot_do_is_said(profiled, tmp_path):
    vlm = vlm_of("llava")
    assert "no patching profile" in Amplify().check(vlm)
    assert "outside the model's 3 layers of 8 heads" in parse("amplify:heads=L3H0").check(vlm)
    with pytest.raises(UsageError, match=r"profile=.* does nothing with heads=L0H1"):
        parse(f"amplify:heads=L0H1,profile={profiled}")
    save_profiles({"patching": made_profile(vlm, "patching", torch.ones(3, 8))}, tmp_path / "memory")
    assert Amplify(profile=str(tmp_path / "memory")).check(vlm) == (
        "no head of the profile's middle layers is a context head"
    )
    with pytest.raises(IncompatibleDecodersError, match="no patching profile"):
        logits(vlm, batch_of(vlm), "amplify")
