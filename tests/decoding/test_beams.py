"""Our beam search finds the answers and scores of transformers' search, whatever acts in its passes."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import STRONG, batch_of, crossed, method_of, vlm_of
from tests.tiny import TINY
from vlmfix.decoding.beams import Search, search
from vlmfix.decoding.running import running

LIMIT = 7


def theirs(vlm, batch, method, *, beams, ends):
    with method.applied(vlm, batch, num_beams=beams) as arguments:
        found = vlm.model.generate(
            **batch,
            **arguments,
            num_beams=beams,
            max_new_tokens=LIMIT,
            do_sample=False,
            eos_token_id=ends,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return found.sequences[:, batch.length :].tolist(), found.sequences_scores.tolist()


@torch.no_grad()
def agree(vlm, method, *, beams, ends):
    batch = batch_of(vlm)
    layout = vlm.layout(batch)
    plan = method.plan(vlm, batch, layout)
    with running(vlm, batch, layout, plan, limit=LIMIT, name=method.spec()) as call:
        ours = search(call, beams, ends)
    for found, tokens, score in zip(ours, *theirs(vlm, batch, method, beams=beams, ends=ends), strict=True):
        assert list(found.answer) == tokens[: len(found.answer)]
        assert found.score == pytest.approx(score, abs=1e-4)
    return [len(found.answer) for found in ours]


@pytest.mark.parametrize("family", TINY)
def test_plain_search(family):
    """With one end token that is never said, and with so many that answers end early and at different lengths."""
    vlm = vlm_of(family)
    end = vlm.model.generation_config.eos_token_id
    assert agree(vlm, method_of("greedy"), beams=4, ends=[end] if isinstance(end, int) else end) == [LIMIT, LIMIT]
    for beams, share in MANY:
        agree(vlm, method_of("greedy"), beams=beams, ends=list(range(0, 260, share)))


def test_answers_of_the_searches_end_at_different_lengths():
    """So that what is compared above are searches that end early, too."""
    ends = list(range(0, 260, 3))
    lengths = [agree(vlm_of(family), method_of("greedy"), beams=3, ends=ends) for family in ("llava", "qwen3_vl")]
    assert len({length for pair in lengths for length in pair}) > 1


MANY = ((2, 7), (3, 3), (5, 2))
"""Beams, and which share of the vocabulary ends an answer."""


@pytest.mark.parametrize(("family", "name"), crossed(STRONG, turn=0))
def test_search_with_a_method_at_work(family, name):
    agree(vlm_of(family), method_of(STRONG[name]), beams=3, ends=list(range(60)))


def test_of_equal_scores_the_first_stays():
    one = Search(number=0, beams=2)
    for score, token in ((-1.0, 1), (-2.0, 2), (-1.0, 3), (-3.0, 4)):
        one.end(score, (token,))
    assert one.ended == ((-1.0, (1,)), (-1.0, (3,)))
    assert not one.is_done(-0.9)
    assert one.is_done(-1.0)
