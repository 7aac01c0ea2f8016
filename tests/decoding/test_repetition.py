"""The penalty on repetition: what transformers makes of it, in every way to decode."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, batch_of, vlm_of
from vlmfix.decoding.repetition import penalized, standing
from vlmfix.errors import UsageError

ROWS, PENALTY = [list(row) for row in PICTURES], 1.7


def test_scores_by_hand():
    stands = standing(torch.tensor([[1, 1, 9], [0, 2, 3]]), torch.tensor([[1, 1, 1], [0, 1, 1]]).bool(), 4)
    assert stands.tolist() == [[False, True, False, False], [False, False, True, True]]  # 9 is none, 0 is masked
    scores = penalized(torch.tensor([[1.0, -2.0, 3.0, -torch.inf]]), torch.tensor([[True, True, False, True]]), 2)
    assert scores.tolist() == [[0.5, -4.0, 3.0, -torch.inf]]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answers_are_those_of_transformers(family, beams):
    vlm = vlm_of(family)
    call = {"max_new_tokens": 8, "num_beams": beams}
    together = vlm.generate(ROWS, PROMPTS, repetition_penalty=PENALTY, **call)
    plain = vlm.generate(ROWS, PROMPTS, **call)
    assert [answer.ids for answer in together] != [answer.ids for answer in plain]
    for row, answer in enumerate(together):  # alone, for transformers counts what fills up a row
        batch = batch_of(vlm, [row])
        found = vlm.model.generate(**batch, do_sample=False, repetition_penalty=PENALTY, **call)
        assert found[0, batch.length :].tolist()[: len(answer.ids)] == list(answer.ids)


def test_every_way_to_decode_has_the_same():
    vlm = vlm_of("llava")
    for how in ({}, {"num_beams": 3}, {"temperature": 1.5, "seed": 3}):
        call = {"max_new_tokens": 6, "repetition_penalty": PENALTY, **how}
        answers = vlm.generate(ROWS, PROMPTS, **call)
        static = vlm.generate(ROWS, PROMPTS, static_cache=True, **call)
        assert [answer.ids for answer in static] == [answer.ids for answer in answers]
        for row, prompt, answer in zip(ROWS, PROMPTS, answers, strict=True):
            assert vlm.generate([row], prompt, **call)[0].ids == answer.ids
    streamed = vlm.stream(ROWS[0], PROMPTS[0], max_new_tokens=6, repetition_penalty=PENALTY)
    (answer,) = vlm.generate(ROWS[:1], PROMPTS[0], max_new_tokens=6, repetition_penalty=PENALTY)
    assert "".join(streamed) == answer.text


@pytest.mark.parametrize("decoder", ["vcd:plausibility=0", "sgrs:draw=greedy,top_k=3"])
def test_it_acts_on_what_a_decoder_has_made(decoder):
    vlm = vlm_of("llava")
    call = {"decoder": decoder, "max_new_tokens": 8}
    strong = vlm.generate(ROWS[:1], PROMPTS[0], repetition_penalty=100, **call)[0].ids
    assert len(set(strong)) == len(strong)
    assert strong != vlm.generate(ROWS[:1], PROMPTS[0], **call)[0].ids


@pytest.mark.parametrize("penalty", [0, -1, 101, float("nan"), "much"])
def test_a_penalty_out_of_range(penalty):
    with pytest.raises(UsageError, match="repetition_penalty"):
        vlm_of("llava").generate(ROWS[:1], "?", repetition_penalty=penalty)
