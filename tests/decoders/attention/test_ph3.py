"""PH3: which heads a profile gives it, and that exactly these are off."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests.contracts.support import PICTURES, batch_of, close, logits, picture, plain, vlm_of
from tests.tiny import TINY
from vlmfix.decoders import PH3, parse
from vlmfix.decoders.attention.ph3 import Pruning
from vlmfix.errors import DataError, IncompatibleDecodersError, ProfileMismatchError, UsageError
from vlmfix.heads.measure import profile
from vlmfix.heads.profile import HeadProfile, save_profiles

HEADS = "L0H2/L1H0/L1H6/L2H5"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A file with a made-up patching profile of the tiny LLaVA: layers' scores 0, 1, ... 7, then 0, -1, ..., then 0."""
    vlm = vlm_of("llava")
    made = profile(vlm, [picture(1, (40, 60))], ["image-mass"])["image-mass"]
    scores = torch.stack([torch.arange(8.0), -torch.arange(8.0), torch.zeros(8)])
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    patching = HeadProfile(scores, scores.abs(), replace(made.card, profiler="patching"), made.fingerprint)
    save_profiles({"patching": patching, "image-mass": made}, path)
    return str(path)


@pytest.mark.parametrize(
    ("group", "share", "expected"),
    [
        ("memory", 0.05, [(0, 7)]),  # 1.2 of 24
        ("memory", 0.01, [(0, 7)]),  # at least one
        ("memory", 3 / 24, [(0, 7), (0, 6), (0, 5)]),
        ("context", 2 / 24, [(1, 7), (1, 6)]),
        ("memory", 1, [(0, head) for head in range(7, 0, -1)]),  # a head of score 0 is in neither group
        ("context", 0.9, [(1, head) for head in range(7, 0, -1)]),
        ("memory", 0, []),
    ],
)
def test_the_strongest_heads_of_one_group_are_pruned(profiled, group, share, expected):
    decoder = PH3(group=group, share=share, profile=profiled)
    assert list(decoder.chosen(vlm_of("llava"))) == expected
    assert decoder.check(vlm_of("llava")) is None


def test_a_profile_prunes_as_the_heads_that_it_names(profiled):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    given = logits(vlm, batch, PH3(heads=parse("ph3:heads=L0H7/L0H6").heads))
    assert torch.equal(logits(vlm, batch, PH3(share=2 / 24, profile=profiled)), given)
    facts = PH3(profile=profiled).facts(vlm)
    assert facts["profile"] == "patching in heads.safetensors"
    assert facts["profile_digest"].startswith("sha256:")
    assert parse("ph3:heads=L0H1").facts(vlm) == {}


@contextmanager
def silenced(vlm, pairs, shown):
    """Sets slices of what enters the output projections to 0, in the rows that have a picture."""

    def hook(heads):
        def silence(module, args):
            given = args[0].clone()
            for head in heads:
                width = given.shape[-1] // 8
                given[shown, :, head * width : (head + 1) * width] = 0
            return (given,)

        return silence

    modules = vlm.family.attention_modules(vlm.model)
    hooks = [
        modules[layer].o_proj.register_forward_pre_hook(hook([head for other, head in pairs if other == layer]))
        for layer in {layer for layer, _ in pairs}
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@pytest.mark.parametrize("family", TINY)
def test_the_heads_are_off_at_every_position_and_step(family):
    vlm = vlm_of(family)
    pictures = [PICTURES[0], ()]
    batch = vlm.encode(["what is here, and where?", "hello there"], pictures)
    decoder = parse(f"ph3:heads={HEADS}")
    with silenced(vlm, decoder.heads.pairs, [0]):
        expected = plain(vlm, batch)
    found = logits(vlm, batch, decoder)
    close(found, expected)
    close(found[:, 1], plain(vlm, batch)[:, 1])  # no picture, no conflict
    assert (found[:, 0] - plain(vlm, batch)[:, 0]).abs().max() > 1e-2


def test_without_any_picture_nothing_is_edited():
    vlm = vlm_of("qwen2_vl")
    batch = vlm.encode(["hello"], [()])
    assert parse(f"ph3:heads={HEADS}").plan(vlm, batch, vlm.layout(batch)).edits == ()


def test_only_layers_with_a_pruned_head_are_touched(profiled):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    (edit,) = PH3(profile=profiled).plan(vlm, batch, vlm.layout(batch)).edits
    assert isinstance(edit, Pruning)
    assert str(edit.layers) == "0"
    assert edit.pruned.nonzero().tolist() == [[0, 7]]


def test_what_it_cannot_do_is_said(profiled, tmp_path):
    vlm = vlm_of("llava")
    reason = PH3().check(vlm)
    assert "no patching profile" in reason
    assert "--prompt" in reason
    with pytest.raises(IncompatibleDecodersError, match="no patching profile"):
        logits(vlm, batch_of(vlm), "ph3")
    assert "outside the model's 3 layers of 8 heads" in parse("ph3:heads=L3H0").check(vlm)
    assert PH3(share=0).check(vlm) is None
    with pytest.raises(UsageError, match=r"profile=.* does nothing with heads=L0H1"):
        parse(f"ph3:heads=L0H1,profile={profiled}")
    made = HeadProfile.load(tmp_path.joinpath(profiled), "image-mass")
    empty = {"patching": replace(made, scores=-made.scores.abs(), card=replace(made.card, profiler="patching"))}
    save_profiles(empty, tmp_path / "context")
    assert PH3(profile=str(tmp_path / "context")).check(vlm) == "no head of the profile is a memory head"
    for model, file, kind in ((vlm, "missing", DataError), (vlm_of("qwen2_vl"), profiled, ProfileMismatchError)):
        with pytest.raises(kind):
            PH3(profile=file).chosen(model)
