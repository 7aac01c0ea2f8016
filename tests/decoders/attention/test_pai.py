"""PAI against the slow way of its formula."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, vlm_of
from tests.decoders.whole import both_ways
from vlmfix.decoders import PAI
from vlmfix.decoders.attention.pai import Guidance


def raised(gain, layers, *, first_token=True):
    def edit(here):
        rows = here.last if first_token else here.last & (here.last.cumsum(dim=0) > 1)
        chosen = rows[:, None] & here.image[None]
        if here.layer not in layers:
            return here.output(here.scores)
        return here.output(torch.where(chosen, here.scores + gain * here.scores.abs(), here.scores))

    return edit


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("first_token", [True, False])
def test_scores_of_the_picture_are_raised_in_rows_that_predict(family, first_token):
    method = PAI(gain=2, guidance=1, layers="1:", first_token=first_token)
    found, expected = both_ways(method, raised(2, (1, 2), first_token=first_token), family)
    close(found, expected)
    _, other = both_ways(method, raised(2, (0, 1, 2)), family)
    assert (expected - other).abs().nan_to_num().max() > 1e-2


def test_the_guidance_is_that_of_log_probabilities():
    torch.manual_seed(0)
    clean, text = torch.randn(2, 3, 40)
    rule = Guidance(branches=(), rows=torch.ones(3, dtype=torch.bool), guidance=1.7, plausibility=0.2)
    with_picture, without = clean.double().log_softmax(-1), text.double().log_softmax(-1)
    expected = without + 1.7 * (with_picture - without)
    keep = with_picture >= with_picture.max(-1, keepdim=True).values + torch.tensor(0.2).log()
    found = rule.fuse(clean, text[None], clean).double().log_softmax(-1)
    close(found, expected.masked_fill(~keep, -torch.inf).log_softmax(-1))


def test_the_second_row_has_no_picture_and_no_edit():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, (0,))
    plan = PAI().plan(vlm, batch, vlm.layout(batch))
    (branch,) = plan.contrasts[0].branches
    assert not vlm.layout(branch.batch).tokens.any()
    assert branch.batch.length < batch.length
    assert not PAI(guidance=1).plan(vlm, batch, vlm.layout(batch)).contrasts


def test_the_released_code_leaves_the_first_token_to_the_plain_attention():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, (0, 1))
    released, plain = PAI(preset="official-code", gain=5, guidance=1), "greedy"
    close(logits(vlm, batch, released, steps=1), logits(vlm, batch, plain, steps=1))
    assert (logits(vlm, batch, released)[1:] - logits(vlm, batch, plain)[1:]).abs().nan_to_num().max() > 1e-3
