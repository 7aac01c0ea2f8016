"""VAR against its specification's invariants and a slow version."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import PICTURES, batch_of, close, logits, plain, vlm_of
from vlmfix.decoders import VAR
from vlmfix.decoders.attention.var import Redistribution, redistribute
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError, UsageError
from vlmfix.insight.sinks import sink_strength
from vlmfix.upstream.cache import handed_over, returned

B, H, Q, K = 2, 4, 3, 12


def attention(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, H, Q, K, generator=generator, dtype=torch.float64) * 1.5).softmax(-1)


def keys(*rows):
    mask = torch.zeros(B, K, dtype=torch.bool)
    for row, chosen in enumerate(rows):
        mask[row, list(chosen)] = True
    return mask


IMAGE = keys(range(3, 9), range(2, 7))
SINK = keys([0, 4], [0, 2, 3])  # key 0 is text


def slow(weights, image, sink, moved, ratio, mass):
    """One row at a time, from the formulas of the specification, section 2.3 and 2.4."""
    new = weights.clone()
    for b in range(weights.shape[0]):
        shown, sinks = image[b].nonzero().flatten().tolist(), sink[b].nonzero().flatten().tolist()
        visual = [j for j in sinks if j in shown]
        target = [j for j in shown if j not in sinks]
        for h in range(weights.shape[1]):
            for q in range(weights.shape[2]):
                row = weights[b, h, q]
                seen = sum(row[j] for j in shown)
                if not visual or not target or seen < mass or seen == 0:
                    continue
                if (seen - sum(row[j] for j in visual)) / seen < ratio:
                    continue
                freed = moved * sum(row[j] for j in sinks)
                kept = sum(row[j] for j in target)
                for j in sinks:
                    new[b, h, q, j] = (1 - moved) * row[j]
                for j in target:
                    new[b, h, q, j] = row[j] + freed * row[j] / kept
    return new


@pytest.mark.parametrize("moved", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 1.01])
@pytest.mark.parametrize("mass", [0.0, 0.4, 1.01])
def test_against_the_slow_version(moved, ratio, mass):
    weights = attention()
    got = redistribute(weights, IMAGE, SINK, moved=moved, ratio=ratio, mass=mass)
    torch.testing.assert_close(got, slow(weights, IMAGE, SINK, moved, ratio, mass), atol=1e-12, rtol=0)


def test_invariants_of_a_selected_row():
    weights = attention()
    got = redistribute(weights, IMAGE, SINK, moved=0.4, ratio=0, mass=0)
    torch.testing.assert_close(got.sum(-1), weights.sum(-1))
    assert (got >= 0).all()
    other = ~(IMAGE | SINK)[:, None, None].expand_as(weights)
    assert torch.equal(got[other], weights[other])
    target = (IMAGE & ~SINK)[:, None, None]
    gained = ((got - weights) * target).sum(-1)
    torch.testing.assert_close(gained, 0.4 * (weights * SINK[:, None, None]).sum(-1))
    first = weights[0, 0, 0, [3, 5]], got[0, 0, 0, [3, 5]]
    torch.testing.assert_close(first[0][0] / first[0][1], first[1][0] / first[1][1])
    everything = redistribute(weights, IMAGE, SINK, moved=1.0, ratio=0, mass=0)
    assert (everything[SINK[:, None, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize(
    ("image", "sink", "options"),
    [
        (IMAGE, SINK, {"moved": 0.0}),
        (IMAGE, keys([0], [0, 1]), {}),  # textual sinks only
        (IMAGE, keys([], []), {}),
        (keys([], []), SINK, {}),
        (IMAGE, SINK | IMAGE, {}),  # every image token is a sink
        (IMAGE, SINK, {"ratio": 1.01}),
        (IMAGE, SINK, {"mass": 1.01}),
    ],
)
def test_identities(image, sink, options):
    weights = attention()
    settings = {"moved": 0.6, "ratio": 0.0, "mass": 0.0, **options}
    got = redistribute(weights, image, sink, **settings)
    assert got.isfinite().all()
    torch.testing.assert_close(got, weights, atol=1e-15, rtol=0)


def test_a_row_at_both_bounds_is_selected():
    """Half of the attention is on the picture, half of that on what is no sink; all of it exact in binary."""
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)[None, None, None]
    image, sink = torch.tensor([[False, True, True]]), torch.tensor([[False, True, False]])
    for mass, ratio, kept in ((0.5, 0.5, 0.0), (0.5 + 1e-9, 0.5, 0.25), (0.5, 0.5 + 1e-9, 0.25)):
        got = redistribute(weights, image, sink, moved=1.0, ratio=ratio, mass=mass)
        assert got.flatten().tolist() == [0.5, kept, 0.5 - kept]


def test_a_larger_ratio_selects_fewer_rows():
    weights = attention()
    chosen = []
    for ratio in (0.0, 0.3, 0.5, 0.7, 0.9):
        got = redistribute(weights, IMAGE, SINK, moved=1.0, ratio=ratio, mass=0)
        chosen.append((got != weights).any(-1))
    for fewer, more in zip(chosen[1:], chosen, strict=False):
        assert (fewer <= more).all()
    assert chosen[-1].sum() < chosen[0].sum()


def test_selection_is_on_the_unedited_map_so_twice_is_more():
    weights = attention()
    once = redistribute(weights, IMAGE, SINK, moved=0.4, ratio=0, mass=0)
    twice = redistribute(once, IMAGE, SINK, moved=0.4, ratio=0, mass=0)
    assert not torch.allclose(once, twice)


def test_the_output_can_be_corrected_without_the_map():
    """o' = o - m o_S + m a_S o_G / G, the identity of section 2.7."""
    weights = attention()
    values = torch.randn(B, H, K, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = redistribute(weights, IMAGE, SINK, moved=0.4, ratio=0, mass=0) @ values
    sink, target = (weights * SINK[:, None, None]), (weights * (IMAGE & ~SINK)[:, None, None])
    want = (
        weights @ values
        - 0.4 * (sink @ values)
        + 0.4 * sink.sum(-1, keepdim=True) * (target @ values) / target.sum(-1, keepdim=True)
    )
    torch.testing.assert_close(got, want)


def test_phi():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator, dtype=torch.float32)
    base = sink_strength(x, (3, 7))
    assert base.max() < 4
    torch.testing.assert_close(sink_strength(x * 1000, (3, 7)), base, atol=1e-3, rtol=1e-3)
    order = [*range(8), *(8 + torch.randperm(56, generator=generator)).tolist()]
    torch.testing.assert_close(sink_strength(x[:, order], (3, 7)), base)
    planted = x.clone()
    planted[[5, 11], 7] = 50 * math.sqrt(64)
    found = sink_strength(planted, (3, 7)) > 0.5 * math.sqrt(64)
    assert found.nonzero().flatten().tolist() == [5, 11]
    assert sink_strength(planted, (3, 7)).max() <= math.sqrt(64) + 1e-4


def test_presets_and_the_released_codes_convention():
    assert (VAR().moved_fraction, str(VAR().layers)) == (0.6, "2:-1")
    assert (VAR(preset="official-code").moved_fraction, str(VAR(preset="official-code").layers)) == (
        0.4,
        "2:",
    )
    official = VAR.from_official(p=0.6, rho=0.5)
    assert (official.moved_fraction, official.min_nonsink_ratio) == (0.4, 0.5)
    assert VAR.from_official(p=0.6, rho=0.2).min_nonsink_ratio == 0.8
    with pytest.raises(UsageError, match=r"p=1\.2"):
        VAR.from_official(p=1.2, rho=0.5)


LOOSE = {
    "sink_dims": (1, 2, 3, 4),
    "sink_threshold": 0.8,
    "min_visual_mass": 0.0,
    "min_nonsink_ratio": 0.0,
    "layers": "2:",
    "moved_fraction": 1.0,
}


def sinks_after(vlm, batch, method):
    """The sinks that one run of the method remembered."""
    plan = method.plan(vlm, batch, vlm.layout(batch))

    class Planned(VAR):
        def plan(self, vlm, batch, layout):
            return plan

    logits(vlm, batch, Planned(**LOOSE))
    (edit,) = plan.edits
    assert isinstance(edit, Redistribution)
    return {layer: memory.of_keys["sinks"] for layer, memory in edit.memory.items()}


def test_sinks_are_found_anew_for_every_picture_and_match_the_hidden_states():
    vlm = vlm_of("llava")
    method = VAR(**LOOSE)
    found = []
    for row in (0, 1, 0):
        batch = batch_of(vlm, [row])
        sinks = sinks_after(vlm, batch, method)
        assert set(sinks) == {2}
        hidden = vlm.model(**batch, output_hidden_states=True).hidden_states[2]
        want = sink_strength(hidden.detach(), method.sink_dims) > 0.8
        assert torch.equal(sinks[2], want)
        assert want.any()
        assert not want.all()
        found.append(sinks[2])
    assert torch.equal(found[0], found[2])
    assert found[0].shape != found[1].shape


def test_the_second_sample_does_not_remember_the_first():
    vlm = vlm_of("llava")
    method = VAR(**LOOSE)
    alone = logits(vlm, batch_of(vlm, [1]), method)
    logits(vlm, batch_of(vlm, [0]), method)
    close(logits(vlm, batch_of(vlm, [1]), method), alone, 0)


def test_system_and_image_rows_of_the_prompt_are_unchanged():
    """In the first edited layer, outputs differ only in the text rows after the picture."""
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?"], [PICTURES[0]])
    method = VAR(**LOOSE)
    outputs = []

    def keep(module, args, output):
        outputs.append(output[0].detach())

    handle = vlm.family.attention_modules(vlm.model)[2].register_forward_hook(keep)
    try:
        vlm.model(**batch)
        with method.applied(vlm, batch):
            vlm.model(**batch)
    finally:
        handle.remove()
    changed = (outputs[0] != outputs[1]).any(-1)[0]
    after = vlm.layout(batch).text_after_image()[0]
    assert changed.any()
    assert not (changed & ~after).any()


def test_the_first_two_layers_are_never_edited():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    (edit,) = VAR(**{**LOOSE, "layers": "all"}).plan(vlm, batch, vlm.layout(batch)).edits
    assert edit.layers.resolve(3) == {2}
    with pytest.raises(IncompatibleDecodersError, match="without the first two"):
        VAR(**{**LOOSE, "layers": "0:2"}).plan(vlm, batch, vlm.layout(batch))


def test_a_model_without_sinks_says_so():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    reason = VAR().check(vlm)
    assert reason is not None
    assert "no sink dimensions" in reason or "no visual sinks" in reason
    with pytest.raises(IncompatibleDecodersError, match="var cannot act"):
        logits(vlm, batch, VAR())
    assert VAR(**LOOSE).check(vlm) is None
    assert "outside the model's 64" in VAR(sink_dims=(3, 64)).check(vlm)


def test_full_ratio_is_the_plain_model():
    vlm = vlm_of("qwen2_vl")
    batch = batch_of(vlm)
    close(logits(vlm, batch, VAR(**{**LOOSE, "min_nonsink_ratio": 1.01})), plain(vlm, batch))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_without_a_picture_are_decoded_plainly(family):
    vlm = vlm_of(family)
    nothing = vlm.encode(["what is here?", "hello"], [[], []])
    close(logits(vlm, nothing, VAR(**LOOSE)), plain(vlm, nothing), 0)
    mixed = vlm.encode(["what is here?", "hello"], [PICTURES[0], []])
    got, want = logits(vlm, mixed, VAR(**LOOSE)), plain(vlm, mixed)
    close(got[:, 1], want[:, 1])
    assert (got[:, 0] - want[:, 0]).abs().max() > 1e-3


def test_a_cache_from_before_the_session_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    behind = handed_over(vlm.model, returned(vlm.model, vlm.model(**batch, use_cache=True)))
    with VAR(**LOOSE).applied(vlm, batch), pytest.raises(UnsupportedAttentionError, match="before its prompt"):
        vlm.model(input_ids=torch.full((2, 1), 40), **behind)
