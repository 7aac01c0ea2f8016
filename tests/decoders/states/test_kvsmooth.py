"""KVSmooth against the slow way: rows one after the other, each over what is kept of those before it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.contracts.support import Forced, batch_of, close, logits, vlm_of
from tests.decoders.attention.test_locore import site
from tests.decoders.whole import both_ways
from tests.tiny import TINY
from vlmfix.attention.edit import Column
from vlmfix.decoders import KVSmooth, parse
from vlmfix.decoders.states.kvsmooth import Smoothed, inner, turned_on
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError
from vlmfix.upstream.cache import handed_over, keys_and_values
from vlmfix.upstream.positions import frequencies

STEPS = 6


def smoothed(low, high, window, layers, *, heads=True):
    """The formula, row by row, in float64."""

    def edit(here):
        output = here.output(here.scores)
        if here.layer not in layers:
            return output
        keys, values, seen = here.keys.clone(), here.values.clone(), []
        for row in (here.last.nonzero().flatten() + 1).tolist()[:-1]:
            weights = (here.queries[:, row] * keys[:, : row + 1].transpose(0, 1)).sum(-1).T.softmax(-1)  # (H, row + 1)
            output[:, row] = (weights[..., None] * values[:, : row + 1]).sum(1)
            counted = weights if heads else weights.mean(0, keepdim=True)
            seen.append(float(-(counted * counted.log()).sum(-1).mean()))
            last = seen[-window:]
            share = min(max(sum(one <= seen[-1] for one in last) / len(last), low), high)
            for kept in (keys, values):
                kept[:, row] = (1 - share) * kept[:, row] + share * kept[:, row - 1]
        return output

    return edit


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("entropy", ["heads", "mean"])
def test_each_token_is_mixed_with_what_is_kept_of_the_one_before(family, entropy):
    method = KVSmooth(strength=0.5, spread=0.3, window=3, entropy=entropy, layers="1:")
    found, expected = both_ways(method, smoothed(0.2, 0.8, 3, (1, 2), heads=entropy == "heads"), family, STEPS)
    close(found, expected)
    for other in (smoothed(0.2, 0.8, 3, (0, 1, 2)), smoothed(0.2, 0.8, 2, (1, 2)), smoothed(0, 0, 3, ())):
        _, wrong = both_ways(method, other, family, STEPS)
        assert (expected - wrong).abs().nan_to_num().max() > 1e-3


def unrotated(vlm, layer, keys):
    """Keys (H, T, D) of one text row's tokens before the rotary embedding, and the function that rotates them."""
    angles = frequencies(vlm.family.decoder(vlm.model), vlm.family.attention_modules(vlm.model)[layer]).double()
    places = torch.arange(keys.shape[1]).double()[:, None] * angles  # any beginning of counting will do
    waves = torch.polar(torch.ones_like(places), places)  # (T, D / 2)

    def complex_of(x):
        return torch.complex(*x.double().chunk(2, dim=-1))

    def rotated(x):
        turned = complex_of(x) * waves[: x.shape[1]]
        return torch.cat([turned.real, turned.imag], dim=-1)

    back = complex_of(keys) * waves.conj()
    return torch.cat([back.real, back.imag], dim=-1), rotated


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_keys_are_mixed_before_they_are_rotated(family):
    """In the slow way the tokens' keys are turned back by their places, mixed, and turned again."""
    vlm = vlm_of(family)

    def edit(here):
        output = here.output(here.scores)
        values = here.values.clone()
        before, rotated = unrotated(vlm, here.layer, here.keys)
        keys = here.keys.clone()
        for row in (here.last.nonzero().flatten() + 1).tolist()[:-1]:
            weights = (here.queries[:, row] * keys[:, : row + 1].transpose(0, 1)).sum(-1).T.softmax(-1)
            output[:, row] = (weights[..., None] * values[:, : row + 1]).sum(1)
            for kept in (before, values):
                kept[:, row] = 0.5 * kept[:, row] + 0.5 * kept[:, row - 1]
            keys[:, row] = rotated(before)[:, row]
        return output

    spec = "kvsmooth:strength=0.5,spread=0,layers=all,rotary=before"
    found, expected = both_ways(spec, edit, family, STEPS)
    close(found, expected)
    _, behind = both_ways("kvsmooth:strength=0.5,spread=0,layers=all", smoothed(0.5, 0.5, 15, (0, 1, 2)), family, STEPS)
    assert (expected - behind).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("family", TINY)
def test_a_key_is_turned_on_by_one_place(family):
    """Two equal tokens in a row, whose keys the model's first layer makes."""
    vlm = vlm_of(family)
    decoder, (module, *_) = vlm.family.decoder(vlm.model), vlm.family.attention_modules(vlm.model)
    cache = DynamicCache()
    decoder(torch.tensor([[9, 9, 9]]), **handed_over(decoder, cache), use_cache=True)
    keys = keys_and_values(cache)[0][0][0].detach()  # (G, 3, D)
    close(turned_on(keys[:, :2], frequencies(decoder, module)), keys[:, 1:])


def test_the_share_is_the_rank_of_the_entropy_among_the_last():
    edit = Smoothed(low=0.0, high=1.0, window=3, heads=True)
    here = site([4], keys=5, prompt=4, image=[1, 2], text=[0, 3])
    edit.begin(here)
    column = (Column(torch.ones(1, 2, 1, 4), torch.full((1, 2, 1, 4), 5.0)), Column(*torch.zeros(2, 1, 2, 1, 4)))
    shares = []
    for certain in (0.7, 0.9, 0.8, 0.5, 0.95):  # the larger, the smaller the entropy
        weights = torch.tensor([certain, 1 - certain, 0, 0, 0]).expand(1, 4, 1, 5)
        keys, values = edit.kept(here, weights, *column)
        close(values, 5 * keys)
        shares.append(round(1 - float(keys.mean()), 4))
    assert shares == [1.0, 0.5, 0.6667, 1.0, 0.3333]


def test_without_strength_every_bit_is_kept():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    none = KVSmooth(strength=0, spread=0, layers="all")
    assert torch.equal(logits(vlm, batch, none, steps=STEPS), logits(vlm, batch, steps=STEPS))


def test_a_token_is_changed_no_earlier_than_the_second_behind_it():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    changed = logits(vlm, batch, KVSmooth(strength=1, spread=0, layers="all")) - logits(vlm, batch)
    assert (changed[:2].nan_to_num() == 0).all()
    assert (changed[2].abs().amax(dim=1) > 1e-3).all()


def test_caches_of_which_attention_gets_copies_are_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])

    class Own(DynamicCache):
        pass

    cache = handed_over(vlm.model, Own(config=vlm.model.config.get_text_config()))
    with pytest.raises(UnsupportedAttentionError, match="a Own gives attention copies"):
        logits(vlm, batch, KVSmooth(layers="all"), **cache)


@pytest.mark.parametrize("spec", ["kvsmooth:layers=all+sgrs", "sgrs+kvsmooth:layers=all", "opera+kvsmooth"])
def test_what_needs_the_cache_as_it_was_is_refused(spec):
    vlm = vlm_of("llava")
    refusal = r"edits the KV cache, and another (asks for gradients|goes back)"
    with pytest.raises(IncompatibleDecodersError, match=refusal):
        logits(vlm, batch_of(vlm), parse(spec))


def test_the_layers_are_those_of_32_by_depth():
    assert inner(32).spec == "3:31"
    assert all(inner(count).resolve(count) for count in range(1, 40))


def test_a_contrast_row_keeps_its_cache_as_it_is():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    tokens = torch.arange(20, 20 + 2 * STEPS).view(2, STEPS)

    def said(spec):
        return logits(vlm, batch, spec, steps=STEPS, logits_processor=[Forced(tokens, batch.length)])

    smooth, vcd = "kvsmooth:strength=0.6,spread=0.4,layers=all", "vcd:contrast=1,plausibility=0"
    noisy = 2 * said("greedy") - said(vcd)
    close(said(f"{smooth}+{vcd}"), 2 * said(smooth) - noisy, 1e-3)


@pytest.mark.parametrize("beside", ["", "+vcd:plausibility=0"])
def test_beams_of_our_own_loop_are_those_of_transformers(beside):
    vlm = vlm_of("llava")
    batch, spec = batch_of(vlm), parse(f"kvsmooth:strength=0.6,spread=0.4,window=3,layers=all{beside}")
    options = {"max_new_tokens": 8, "num_beams": 3}
    own = vlm.generate([list(row) for row in batch.pictures], list(batch.prompts), decoder=spec, **options)
    with spec.applied(vlm, batch, num_beams=3) as arguments:
        found = vlm.model.generate(**batch, **arguments, **options, do_sample=False)
    texts = vlm.processor.batch_decode(found[:, batch.length :], skip_special_tokens=True)
    assert [answer.text for answer in own] == [text.strip() for text in texts]
