"""Captions: greedy answers, each to its own end, whose steps can be taken again."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import PICTURES, batch_of, vlm_of
from vlmfix.insight.captions import tell
from vlmfix.insight.work import Work

LONGEST = 6


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_caption_is_the_greedy_answer_and_every_step_again_says_its_token(family, monkeypatch):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    pictures, run = [list(row) for row in PICTURES], {"max_new_tokens": LONGEST}
    said = [answer.ids for answer in vlm.generate(pictures, batch.prompts, **run)]
    end = next(token for token in said[0][:4] if token not in said[1])
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", end)
    expected = [answer.ids for answer in vlm.generate(pictures, batch.prompts, **run)]
    assert len({len(ids) for ids in expected}) == 2, "one row ends before the other"
    work = Work(vlm=vlm, batch=batch, layout=vlm.layout(batch), first=0, seed=0)
    told = tell(work, LONGEST)
    assert list(told.tokens) == expected
    for row, tokens in enumerate(told.tokens):
        for place, token in enumerate(tokens):
            step = told.step(work, row, place)
            assert step.logits([]).argmax().item() == token == step.token
