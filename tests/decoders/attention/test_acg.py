"""ACG against the slow way: two softmaxes over the same scores."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import close
from tests.decoders.attention.test_locore import site
from tests.decoders.whole import both_ways
from vlmfix.decoders import ACG
from vlmfix.decoders.attention.acg import Guided


def guided(strength, layers, *, orthogonal=True, per="head"):
    def edit(here):
        whole = here.output(here.scores)
        if here.layer not in layers:
            return whole
        without = here.output(here.scores.masked_fill(here.image[None, None], -torch.inf))
        effect = whole - without
        if orthogonal:
            flat = (lambda x: x) if per == "head" else (lambda x: x.transpose(0, 1).flatten(1))
            unit = flat(without) / flat(without).norm(dim=-1, keepdim=True)
            inner = (flat(effect) * unit).sum(dim=-1, keepdim=True)
            along = inner * unit
            effect = effect - (along if per == "head" else along.view(len(along), *whole.shape[::2]).transpose(0, 1))
        rows = here.last & here.before.logical_not()
        return torch.where(rows[:, None], whole + strength * effect, whole)

    return edit


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("orthogonal", "per"), [(True, "head"), (True, "layer"), (False, "head")])
def test_outputs_are_pushed_away_from_those_without_the_picture(family, orthogonal, per):
    method = ACG(strength=3, layers="1:", orthogonal=orthogonal, per=per)
    found, expected = both_ways(method, guided(3, (1, 2), orthogonal=orthogonal, per=per), family)
    close(found, expected)
    _, plain = both_ways(method, guided(0, ()), family)
    assert (expected - plain).abs().nan_to_num().max() > 1e-2


def test_what_is_added_is_orthogonal_to_the_output_without_the_picture():
    torch.manual_seed(0)
    weights, values = torch.rand(1, 2, 1, 5).softmax(-1), torch.randn(1, 2, 5, 8)
    here = site([4], keys=5, prompt=5, image=[1, 2], text=[0, 3, 4])
    part = weights * here.image_keys[:, None, None]
    whole, mass = weights @ values, part.sum(-1, keepdim=True)
    new = Guided(strength=2.0, orthogonal=True, heads=True).output(here, whole, part @ values, mass)
    without = (weights - part) @ values / (1 - mass)
    torch.testing.assert_close(((new - whole) * without).sum(-1), torch.zeros(1, 2, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mass", [0.0, 1.0, 1 - 1e-5])
def test_a_head_that_sees_no_picture_or_nothing_else_is_left_alone(mass):
    whole, part = torch.randn(2, 1, 1, 1, 4)
    new = Guided(strength=2.0, orthogonal=True, heads=True).output(None, whole, part, torch.full((1, 1, 1, 1), mass))
    assert torch.equal(new, whole)
