"""What is read of the vision tower's attention, against whole matrices in float64, on the tower of every family."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tests.contracts.support import batch_of, vlm_of
from tests.tiny import TINY
from vlmfix.attention import tower
from vlmfix.attention.session import bare
from vlmfix.attention.tower import TowerEdit, TowerReading, tower_edited, tower_mlps, tower_read
from vlmfix.decoding.encoding import encoded
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.upstream.attention import register, switched, unregister

NAME = "whole_matrices"


@contextmanager
def whole(vlm):
    """Runs the tower with attention written out; yields module -> [(V, H, N, N) float64 of each call]."""
    found = {}

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        scores = query.double() @ key.double().transpose(2, 3) * scaling
        allowed = scores if attention_mask is None else scores.masked_fill(~attention_mask, float("-inf"))
        weights = allowed.softmax(-1)
        found.setdefault(module, []).append(weights)
        return (weights @ value.double()).transpose(1, 2).to(query.dtype).contiguous(), None

    register(NAME, attention)
    try:
        with switched([vlm.family.tower(vlm.model)], NAME):
            yield found
    finally:
        unregister(NAME)


def run(vlm):
    with torch.no_grad():
        features = encoded(vlm.model, batch_of(vlm)).pooler_output
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("room", [2**25, 300], ids=["at once", "a few rows at a time"])
def test_the_sums_are_those_of_the_whole_matrices(family, room, monkeypatch):
    monkeypatch.setattr(tower, "ROOM", room)
    vlm = vlm_of(family)
    classes = vlm.family.class_tokens(vlm.model)
    assert classes == (family in ("llava", "llava_next", "internvl"))
    readings = [TowerReading(0, "class", classes), TowerReading(0, "patches", classes), TowerReading(-1, "class", 1)]
    with tower_read(vlm, readings):
        features = run(vlm)
    with whole(vlm) as matrices:
        torch.testing.assert_close(features, run(vlm), atol=1e-4, rtol=1e-4)
    modules = vlm.family.tower_attention(vlm.model)
    for reading in readings:
        calls = matrices[modules[reading.layer]]
        assert len(reading.sums) == len(calls)
        for sums, weights in zip(reading.sums, calls, strict=True):
            rows = weights[:, :, :1] if reading.rows == "class" else weights[:, :, reading.classes :]
            want = rows.sum(dim=(1, 2))
            want[:, : reading.classes] = torch.nan
            torch.testing.assert_close(sums.double(), want, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_modules_are_those_of_the_tower_in_order():
    for family in TINY:
        vlm = vlm_of(family)
        modules = vlm.family.tower_attention(vlm.model)
        assert len(modules) == 2
        with whole(vlm) as matrices:
            run(vlm)
        assert list(matrices) == modules
        assert not set(modules) & set(vlm.family.attention_modules(vlm.model))


def test_hidden_keys_get_nothing():
    query, key = torch.randn(2, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.tensor([True, False, True]).expand(1, 1, 3, 3)
    reading = TowerReading(0, "patches", 0)
    reading.read(query, key, mask, 0.5)
    assert reading.sums[0][0, 1] == 0
    assert reading.sums[0].sum().item() == pytest.approx(2 * 3)


def test_the_tower_is_left_as_it_was():
    vlm = vlm_of("llava")
    config = vlm.family.tower(vlm.model).config
    before = config._attn_implementation
    reading = TowerReading(1, "class", 1)
    with tower_read(vlm, [reading]):
        assert config._attn_implementation == tower.NAME
    with (
        pytest.raises(UnsupportedAttentionError, match="no layer 2"),
        tower_read(vlm, [reading, TowerReading(2, "class", 1)]),
    ):
        pass
    assert config._attn_implementation == before
    run(vlm)
    assert reading.sums == []
    assert not any(tower.READINGS in module.__dict__ for module in vlm.model.modules())


class Scaled(TowerEdit):
    """Multiplies what one layer's MLP adds, and notes the layers."""

    def __init__(self, layer, factor):
        self.layer, self.factor, self.seen = layer, factor, set()

    def stream(self, layer, stream):
        self.seen.add(layer)
        return stream.double() * self.factor if layer == self.layer else stream


@pytest.mark.parametrize("family", TINY)
def test_an_edit_changes_what_each_layer_of_the_tower_adds(family):
    vlm = vlm_of(family)
    plain, mlps = run(vlm), tower_mlps(vlm)
    assert len(mlps) == len(vlm.family.tower_attention(vlm.model))
    handle = mlps[0].register_forward_hook(lambda module, args, output: output * 6)
    expected = run(vlm)
    handle.remove()
    assert not torch.allclose(plain, expected)
    edit = Scaled(0, 2)
    with tower_edited(vlm, [edit]), tower_edited(vlm, [Scaled(0, 3)]):
        torch.testing.assert_close(run(vlm), expected)
        with bare(vlm):
            assert torch.equal(run(vlm), plain)
    assert edit.seen == set(range(len(mlps)))
    with tower_edited(vlm, []), pytest.raises(KeyError), tower_edited(vlm, [Scaled(0, 2)]):
        raise KeyError
    assert torch.equal(run(vlm), plain)
    assert not any(vars(mlp).get("_vlmfix_tower_edits") or mlp._forward_hooks for mlp in mlps)
