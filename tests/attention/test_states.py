"""Edits of the cache and of the residual stream: which rows and columns they reach, and what they leave."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from tests.attention.test_session import snapshot
from tests.contracts.support import batch_of, extended, plain, vlm_of
from vlmfix.attention.edit import CacheEdit, Column, LayerSet, ResidualEdit
from vlmfix.attention.probe import Enough, ending_at
from vlmfix.attention.session import bare, edited, first_edited
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.upstream.cache import handed_over, keys_and_values, returned

SECOND = torch.tensor([False, True])


@dataclass(frozen=True, eq=False, kw_only=True)
class Halved(CacheEdit):
    """Keeps half of the token's value, and beside it the key of the token before."""

    def begin(self, site):
        site.learn_of_steps("steps", torch.zeros(site.image_keys.shape[0]))

    def kept(self, site, weights, newest, before):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        site.relearn("steps", site.learned("steps") + 1)
        return Column(before.keys, newest.values / 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Shifted(ResidualEdit):
    place: Literal["layer", "mlp"] = "layer"

    def stream(self, site, stream):
        return stream + 3.0


def caches(vlm, batch, edits, live=None):
    """Keys and values of all layers behind a prompt and one token, without edits and with them."""
    found = []
    for own in ((), edits):
        with edited(vlm, vlm.layout(batch), own, live=live), torch.no_grad():
            cache = returned(vlm.model, vlm.model(**batch, use_cache=True))
            longer = extended(batch, torch.tensor([[7], [9]]))
            step = {"input_ids": longer["input_ids"][:, -1:], "attention_mask": longer["attention_mask"]}
            vlm.model(**step, **handed_over(vlm.model, cache), use_cache=True)
        found.append(keys_and_values(cache))
    return found


@pytest.mark.parametrize("live", [None, SECOND])
def test_a_cache_edit_changes_the_newest_column_of_its_rows_and_layers(live):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    edit = Halved(layers=LayerSet("2:"))
    before, after = caches(vlm, batch, [edit], live)
    rows = [1] if live is not None else [0, 1]
    for layer, ((keys, values), (new_keys, new_values)) in enumerate(zip(before, after, strict=True)):
        if layer == 2:
            keys, values = keys.clone(), values.clone()
            keys[rows, :, -1], values[rows, :, -1] = keys[rows, :, -2], values[rows, :, -1] / 2
        assert torch.equal(new_keys, keys)
        assert torch.equal(new_values, values)
    assert edit.memory[2].of_steps["steps"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("place", ["layer", "mlp"])
def test_a_residual_edit_changes_all_columns_of_its_rows_behind_its_layer(place):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    before, after = caches(vlm, batch, [Shifted(layers=LayerSet("1"), place=place)], SECOND)
    changed = [(keys != new).any(dim=-1).any(dim=1) for (keys, _), (new, _) in zip(before, after, strict=True)]
    assert not changed[0].any()
    assert not changed[1].any()
    assert changed[2].tolist() == [[False] * (batch.length + 1), [True] * (batch.length + 1)]


def test_what_they_change_says_from_where_on_prompts_may_be_shared():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    for edit, expected in ((Halved(), None), (Shifted(), 0)):
        with edited(vlm, vlm.layout(batch), [edit]):
            assert first_edited(vlm) == expected


@pytest.mark.parametrize("place", ["layer", "mlp"])
def test_a_pass_that_ends_early_leaves_nothing_to_one_without_edits(place):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    before, state = plain(vlm, batch), snapshot(vlm)
    with edited(vlm, vlm.layout(batch), [Shifted(place=place)]):
        with ending_at(vlm, 1), suppress(Enough):
            plain(vlm, batch)
        with bare(vlm):
            assert torch.equal(plain(vlm, batch), before)
    assert snapshot(vlm) == state


def test_a_cache_that_is_edited_gives_no_gradient():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    longer = extended(batch, torch.tensor([[7], [9]]))
    with (
        edited(vlm, vlm.layout(batch), [Halved()]),
        pytest.raises(UnsupportedAttentionError, match="gradients are wanted through a KV cache"),
    ):
        vlm.model(**longer, use_cache=False)
