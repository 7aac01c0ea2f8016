"""Texts that end an answer."""

from __future__ import annotations

import pytest

from tests.contracts.support import PICTURES, PROMPTS, vlm_of
from vlmfix.errors import UsageError

ROWS = [list(row) for row in PICTURES]
CALL = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def whole():
    """What the tiny model says, long enough to be cut."""
    return vlm_of("llava").generate(ROWS, PROMPTS, **CALL)


def middle(text):
    """A part of a text that begins in one token and ends in another."""
    return text[len(text) // 2 - 1 : len(text) // 2 + 3]


@pytest.mark.parametrize("how", [{}, {"static_cache": True}])
def test_an_answer_ends_before_a_stop(whole, how):
    vlm = vlm_of("llava")
    stop = middle(whole[0].text)
    answers = vlm.generate(ROWS, PROMPTS, stop=["never said", stop], **CALL, **how)
    assert answers[0].text == whole[0].text[: whole[0].text.index(stop)].rstrip()
    assert answers[0].finish == "stop"
    assert answers[0].ids == whole[0].ids[: answers[0].tokens]
    assert answers[0].tokens < whole[0].tokens
    if stop not in whole[1].text:
        assert (answers[1].ids, answers[1].finish) == (whole[1].ids, whole[1].finish)


def test_a_search_looks_for_it_in_the_end():
    vlm = vlm_of("llava")
    (best,) = vlm.generate(ROWS[:1], PROMPTS[0], num_beams=3, **CALL)
    stop = middle(best.text)
    (cut,) = vlm.generate(ROWS[:1], PROMPTS[0], num_beams=3, stop=stop, **CALL)
    assert (cut.text, cut.finish) == (best.text[: best.text.index(stop)].rstrip(), "stop")


def test_a_row_that_has_stopped_is_decoded_no_further(whole):
    vlm, passes = vlm_of("llava"), []
    hook = vlm.model.lm_head.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    try:
        (cut,) = vlm.generate(ROWS[:1], PROMPTS[0], stop=middle(whole[0].text), **CALL)
    finally:
        hook.remove()
    assert len(passes) == cut.tokens


def test_a_stream_says_nothing_of_a_stop(whole):
    vlm, stop = vlm_of("llava"), middle(whole[0].text)
    (cut,) = vlm.generate(ROWS[:1], PROMPTS[0], stop=stop, **CALL)
    for decoder in ("greedy", "beam:num_beams=1"):
        assert "".join(vlm.stream(ROWS[0], PROMPTS[0], stop=stop, decoder=decoder, **CALL)) == cut.text


@pytest.mark.parametrize("stop", ["", [""], [3], None, ["\ud800"]])
def test_what_is_no_stop(stop):
    with pytest.raises(UsageError, match="stop is no text"):
        vlm_of("llava").generate(ROWS[:1], "?", stop=stop)
