"""AD-HH against its specification's invariants and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from tests.contracts.support import PICTURES, batch_of, close, logits, plain, vlm_of
from tests.decoders.attention.test_locore import site
from tests.heads.made import made_profile
from vlmfix.decoders import ADHH, parse
from vlmfix.decoders.attention.adhh import PUBLISHED, Deactivation, text_behind
from vlmfix.errors import IncompatibleDecodersError, ProfileMismatchError, UsageError
from vlmfix.generation import load
from vlmfix.heads.profile import HeadProfile
from vlmfix.language.parameters import HeadList

CAPTIONS = {"target": "captions"}
# text, patch, patch, a newline token between patches, patch, text, text, and two generated tokens
HERE = site([8], keys=9, prompt=7, image=[1, 2, 4], text=[0, 5, 6])
WEIGHTS = torch.tensor(
    [[0.5, 0.05, 0.05, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1], [0.5, 0.1, 0.1, 0.0, 0.0, 0.1, 0.0, 0.1, 0.1]]
)[None, :, None]  # (1, 2, 1, 9)


def edit(*heads, threshold=0.4, count=2):
    chosen = torch.zeros(3, count, dtype=torch.bool)
    for head in heads:
        chosen[:, head] = True
    return Deactivation(chosen=chosen, threshold=threshold)


def test_a_head_that_reads_the_text_loses_it_and_nothing_is_renormalised():
    got = edit(0, 1).weights(HERE, WEIGHTS)
    expected = WEIGHTS.clone()
    expected[0, 0, 0, 5:] = 0.0  # it gives the text behind the picture 0.4; the other one 0.3
    assert torch.equal(got, expected)
    assert float(got[0, 0].sum()) == pytest.approx(0.6)
    assert torch.equal(edit(1).weights(HERE, WEIGHTS), WEIGHTS)


def test_thresholds_at_the_ends():
    drawn = torch.rand(1, 2, 1, 9, generator=torch.Generator().manual_seed(0))
    drawn = drawn / drawn.sum(-1, keepdim=True)
    assert torch.equal(edit(0, 1, threshold=1.01).weights(HERE, drawn), drawn)
    never = edit(0, 1, threshold=0.0).weights(HERE, drawn)
    assert (never[..., 5:] == 0).all()
    assert torch.equal(never[..., :5], drawn[..., :5])
    for threshold in (0.0, 0.3, 0.5):
        assert (edit(0, 1, threshold=threshold).weights(HERE, drawn).sum(-1) <= 1 + 1e-6).all()


def test_what_counts_as_text_behind_the_picture():
    assert text_behind(HERE)[0].nonzero().flatten().tolist() == [5, 6, 7, 8]
    between = site([8], keys=9, prompt=8, image=[1, 5], text=[0, 2, 3, 6, 7])  # text between two pictures is left alone
    assert text_behind(between)[0].nonzero().flatten().tolist() == [6, 7, 8]
    assert not text_behind(site([8], keys=9, prompt=7, text=[0, 1, 2, 3, 4, 5, 6])).any()


def test_rows_without_a_picture_are_decoded_plainly():
    vlm = vlm_of("llava")
    method = ADHH(heads="L0H0/L1H1/L2H2", threshold=0.0)
    batch = vlm.encode(["what?", "and what is this?"], [[], PICTURES[0]])
    got, want = logits(vlm, batch, method), plain(vlm, batch)
    close(got[:, 0], want[:, 0])
    assert (got[:, 1] - want[:, 1]).abs().max() > 1e-3
    blind = vlm.encode(["what?"], [[]])
    assert method.plan(vlm, blind, vlm.layout(blind)).edits == ()


def test_only_layers_with_heads_are_edited():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    (found,) = ADHH(heads="L2H5/L0H3/L2H1").plan(vlm, batch, vlm.layout(batch)).edits
    assert found.layers.resolve(3) == {0, 2}
    assert found.chosen.nonzero().tolist() == [[0, 3], [2, 1], [2, 5]]
    (found,) = ADHH(heads="L2H5/L0H3/L2H1", count=2).plan(vlm, batch, vlm.layout(batch)).edits
    assert found.chosen.nonzero().tolist() == [[0, 3], [2, 5]]


def test_heads_outside_of_the_model_are_refused():
    vlm = vlm_of("llava")
    reason = "heads L3H0/L1H8 are outside the model's 3 layers of 8 heads"
    assert ADHH(heads="L3H0/L1H8/L1H1").check(vlm) == reason
    with pytest.raises(IncompatibleDecodersError, match=reason):
        logits(vlm, batch_of(vlm), ADHH(heads="L3H0/L1H8/L1H1"))


@pytest.mark.parametrize(
    ("kind", "text", "count", "first"),
    [
        ("llava", LlamaConfig(hidden_size=4096, num_hidden_layers=32), 20, (16, 29)),
        ("llava", LlamaConfig(hidden_size=5120, num_hidden_layers=40), 35, (0, 8)),
        ("llava_next", LlamaConfig(hidden_size=7168, num_hidden_layers=60), 10, (45, 34)),
        ("llava_next", LlamaConfig(hidden_size=4096, num_hidden_layers=32), 0, None),
    ],
)
def test_the_authors_heads(kind, text, count, first, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setattr(type(vlm.model.config), "get_text_config", lambda self: text)
    monkeypatch.setattr(vlm.model.config, "model_type", kind)
    chosen = ADHH().chosen(vlm)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen[:1] == (() if first is None else (first,))
    assert ADHH(count=5).chosen(vlm) == chosen[:5]
    assert ADHH().facts(vlm) == {}


def test_the_published_heads_exist():
    shapes = [(32, 32), (40, 40), (60, 56)]
    for (key, heads), (layers, count) in zip(PUBLISHED.items(), shapes, strict=True):
        assert key[3] == layers
        assert all(layer < layers and head < count for layer, head in heads.pairs)


def profiled(tmp_path, scores, parameters=CAPTIONS):
    """A file with a profile of the tiny LLaVA's 3 layers of 8 heads."""
    path = tmp_path / "heads.safetensors"
    made_profile(vlm_of("llava"), "ablation", torch.tensor(scores), parameters=parameters).save(path)
    return str(path)


SCORES = [[0.0, 0.5, -1.0] + [-0.1] * 5, [-0.1] * 7 + [0.9], [0.2] + [-0.1] * 7]


def test_other_models_take_the_strongest_heads_of_a_profile(tmp_path):
    vlm, file = vlm_of("llava"), profiled(tmp_path, SCORES)
    assert ADHH(profile=file).check(vlm) is None
    assert ADHH(profile=file).chosen(vlm) == ((1, 7),)  # 20 in 1024 of 24, at least one
    assert ADHH(profile=file, count=2).chosen(vlm) == ((1, 7), (0, 1))
    assert ADHH(profile=file, count=1000).chosen(vlm) == ((1, 7), (0, 1), (2, 0))  # the others push real words
    assert ADHH(profile=file).facts(vlm)["profile"] == "ablation in heads.safetensors"


def test_the_share_of_a_large_model_is_the_authors_number(tmp_path, monkeypatch):
    vlm, file = vlm_of("llava"), profiled(tmp_path, SCORES)
    large = made_profile(vlm, "ablation", torch.rand(32, 32), parameters=CAPTIONS)
    monkeypatch.setattr("vlmfix.decoders.attention.adhh.profile_for", lambda *_: large)
    assert len(ADHH(profile=file).chosen(vlm)) == 20


def test_profiles_that_say_something_else_are_refused(tmp_path):
    vlm = vlm_of("llava")
    assert "vlmfix profile --model llava --profiler ablation" in ADHH().check(vlm)
    assert "--instances FILE --captions FILE" in ADHH().check(vlm)
    for parameters in ({"target": "next-token"}, {}):
        file = profiled(tmp_path, SCORES, parameters)
        assert "measured without annotations" in ADHH(profile=file).check(vlm)
        with pytest.raises(IncompatibleDecodersError, match="without annotations"):
            logits(vlm, batch_of(vlm), ADHH(profile=file))
    file = profiled(tmp_path, [[-1.0] * 8] * 3)
    assert ADHH(profile=file).check(vlm) == "no head of the profile pushes hallucinated words"
    other = ADHH(profile=profiled(tmp_path, SCORES))
    assert "measured on" in other.check(vlm_of("qwen2_vl"))
    with pytest.raises(ProfileMismatchError):
        other.chosen(vlm_of("qwen2_vl"))


def test_a_profile_gives_the_same_as_its_heads(tmp_path):
    vlm, batch = vlm_of("llava"), batch_of(vlm_of("llava"))
    by_profile = logits(vlm, batch, ADHH(profile=profiled(tmp_path, SCORES), count=3, threshold=0.1))
    by_heads = logits(vlm, batch, ADHH(heads="L0H1/L1H7/L2H0", threshold=0.1))
    close(by_profile, by_heads, 0)
    assert (by_heads - plain(vlm, batch)).abs().max() > 1e-3


def test_a_named_profile_comes_before_the_published_list(tmp_path, monkeypatch):
    vlm, file = vlm_of("llava"), profiled(tmp_path, SCORES)
    text = vlm.model.config.get_text_config()
    monkeypatch.setitem(PUBLISHED, ("llava", "llama", text.hidden_size, 3), HeadList("L0H0"))
    assert ADHH().chosen(vlm) == ((0, 0),)
    assert ADHH(profile=file).chosen(vlm) == ((1, 7),)


@pytest.mark.parametrize("text", ["", "16.29", "L1", "L1H2/", "H1L2", "L1H2,L2H3", "L1H2/L1H2", "l1h2"])
def test_heads_are_layers_and_heads(text):
    with pytest.raises(UsageError):
        ADHH(heads=text)


def test_as_it_is_written():
    method = parse("adhh:heads=L16H29/L26H9,threshold=0.5")
    assert method.heads.pairs == ((16, 29), (26, 9))
    assert parse(method.spec()) == method
    assert HeadList.of(method.heads.pairs) == method.heads
    with pytest.raises(UsageError, match=r"profile=heads\.safetensors does nothing with heads=L16H29"):
        parse("adhh:heads=L16H29,profile=heads.safetensors")
    for wrong in (-0.1, 2.5, math.nan):
        with pytest.raises(UsageError, match="threshold"):
            ADHH(threshold=wrong)


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_the_embedded_models_come_with_a_profile(name):
    vlm = load(name, device="cpu")
    assert ADHH().check(vlm) is None
    profile = HeadProfile.load(vlm.folder / "heads.safetensors", "ablation")
    assert ADHH(count=2).chosen(vlm) == profile.top(2)
    assert ADHH().facts(vlm)["profile"] == "ablation in heads.safetensors"
