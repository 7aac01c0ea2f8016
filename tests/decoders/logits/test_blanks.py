"""AvisC and MoD against their formulas, and that blanked tokens are zeros for the text decoder."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, plain, vlm_of
from tests.decoders.logits.test_early_layers import divergence
from tests.tiny import TINY
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import AvisC, MoD
from vlmfix.decoders.logits.avisc import blind
from vlmfix.decoders.logits.mixture import Mixture
from vlmfix.decoders.logits.mod import most_regarded
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoders.picture.probing import attention_maps
from vlmfix.decoding.running import running
from vlmfix.upstream.names import TextNames


@torch.no_grad()
def without(vlm, batch, blank):
    """First logits (B, V) of a pass in whose embeddings, and deep features, the slow way puts zeros."""
    decoder = vlm.family.decoder(vlm.model)
    names = TextNames.of(decoder)

    def empty(module, args, kwargs):
        embeds = kwargs[names.embeds].clone()
        for row, column in blank.nonzero().tolist():
            embeds[row, column] = 0
        kwargs[names.embeds] = embeds
        if names.deep and kwargs.get(names.deep):
            places = kwargs[names.picture_tokens].nonzero().tolist()
            for level in kwargs[names.deep]:
                for number, (row, column) in enumerate(places):
                    if blank[row, column]:
                        level[number] = 0
        return args, kwargs

    with decoder.register_forward_pre_hook(empty, with_kwargs=True):
        return vlm.model(**batch, use_cache=False).logits[:, -1]


def looked(vlm, batch, row):
    """(L, N) attention of the row that predicts to the image tokens of one row."""
    own = vlm.layout(batch).tokens[row]
    return attention_maps(vlm, batch, LayerSet("all"))[row][0][:, own].double(), own


@pytest.mark.parametrize("family", TINY)
def test_avisc_contrasts_with_blind_tokens_alone(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    blank = torch.zeros_like(vlm.layout(batch).tokens)
    for row in (0, 1):
        seen, own = looked(vlm, batch, row)
        shares = {layer: float(seen[layer].sum() / seen.sum()) for layer in range(len(seen))}
        chosen, total = [], 0.0
        for layer in sorted(shares, key=shares.get, reverse=True):
            chosen.append(layer)
            total += shares[layer]
            if total >= 0.5:
                break
        mean = seen[chosen].mean(dim=0)
        blank[row, own] = mean < mean.mean() + mean.std()
    assert blank.any(dim=1).all()
    expected = 2.5 * plain(vlm, batch, steps=1)[0] - 1.5 * without(vlm, batch, blank)
    method = AvisC(contrast=1.5, plausibility=0)
    close(logits(vlm, batch, method, steps=1)[0], expected)
    plan = method.plan(vlm, batch, vlm.layout(batch))
    with running(vlm, batch, vlm.layout(batch), plan, limit=2, name="avisc") as call, torch.no_grad():
        close(call.prompt(), expected)


def test_few_layers_are_enough_where_one_looks_most():
    seen = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    assert blind(seen, 0.5, 1.0).tolist() == [False, False, False, True]  # one layer has two thirds
    assert blind(seen, 0.9, 0.5).tolist() == [False, False, False, True]
    assert blind(seen, 0.0, -10.0).all()


def test_mod_adds_where_both_rows_agree_and_subtracts_elsewhere():
    dice = torch.Generator().manual_seed(0)
    clean = torch.randn(3, 20, generator=dice)
    other = clean + torch.tensor([0.02, 1.0, 3.0])[:, None] * torch.randn(3, 20, generator=dice)
    rule = Mixture(
        branches=(),
        rows=torch.ones(3, dtype=torch.bool),
        agreement=0.05,
        complement=4.0,
        contrast=1.0,
        plausibility=0.1,
    )
    agree = [divergence(*(x[row].double().softmax(-1) for x in (clean, other))) < 0.05 for row in range(3)]
    assert agree == [True, False, False]
    for step in range(2):  # the first step decides for all
        now, then = (clean, other) if step == 0 else (other, clean.flip(1))
        expected = torch.stack([now[0] + 4 * then[0], *(2 * now[row] - then[row] for row in (1, 2))])
        close(rule.fuse(now, then[None], now), cut(now, expected, 0.1))
    assert not rule.begun().agreed
    kept = rule.keep(torch.tensor([2, 0]))
    two = clean[[2, 0]]
    close(kept.fuse(two, two[None], two), cut(two, torch.stack([two[0], 5 * two[1]]), 0.1))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_mod_sees_the_most_regarded_fifth(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    blank = torch.zeros_like(vlm.layout(batch).tokens)
    for row in (0, 1):
        seen, own = looked(vlm, batch, row)
        total = seen.sum(dim=0)
        least = total.sort().values[int(0.8 * len(total))]  # the released code leaves out so many
        blank[row, own] = total < least
    other = without(vlm, batch, blank)
    clean = plain(vlm, batch, steps=1)[0]
    close(logits(vlm, batch, MoD(agreement=1, plausibility=0), steps=1)[0], clean + 4 * other)
    close(logits(vlm, batch, MoD(agreement=0, plausibility=0), steps=1)[0], 2 * clean - other)


@pytest.mark.parametrize(("count", "kept"), [(576, 116), (256, 52), (10, 2), (1, 1)])
def test_the_share_is_rounded_up_as_the_released_code_rounds_what_it_leaves_out_down(count, kept):
    assert int(most_regarded(torch.rand(count), 0.2).sum()) == kept


def test_one_token_is_left_at_least():
    assert most_regarded(torch.tensor([0.1, 0.5, 0.2]), 0.01).tolist() == [False, True, False]
    assert most_regarded(torch.tensor([0.1, 0.5, 0.2]), 1.0).all()
