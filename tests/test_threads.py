"""Two threads with one model, and streams that nobody reads to their end: every answer is the one of a quiet model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.contracts.support import STRONG, batch_of, method_of, picture, vlm_of
from vlmfix.decoders import parse
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.models.turns import turn_of

PICTURES = [picture(number, (60, 80)) for number in range(3)]


def answers(vlm, decoder):
    return [vlm.generate([shown], "what?", decoder=decoder, max_new_tokens=5)[0].ids for shown in PICTURES]


def state(vlm):
    """What a call could leave on the model."""
    return {
        name: (sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in vlm.model.named_modules()
    }, vlm.model.config.get_text_config()._attn_implementation


@pytest.mark.parametrize(
    "pair",
    [("greedy", "spin"), ("greedy", "vcd"), ("spin", "adhh"), ("vcd", "inter"), ("locore", "sgrs")],
    ids="+".join,
)
def test_two_threads_are_answered_as_one_after_the_other(pair):
    vlm = vlm_of("llava")
    methods = [method_of(STRONG.get(name, name)) for name in pair]
    expected, before = [answers(vlm, method) for method in methods], state(vlm)
    assert expected[0] != expected[1] or "greedy" not in pair
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(answers, vlm, method) for method in methods * 2]
    assert [each.result() for each in found] == expected * 2
    assert state(vlm) == before
    assert answers(vlm, "greedy") == answers(vlm_of("llava"), "greedy")


def test_eight_threads_that_ask_in_all_ways_get_what_each_gets_alone():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)

    def answered(spec):
        return answers(vlm, spec)

    def streamed(spec):
        return ["".join(vlm.stream(shown, "what?", decoder=spec, max_new_tokens=5)) for shown in PICTURES]

    def applied(spec):
        with parse(spec).applied(vlm, batch) as arguments:
            return vlm.model.generate(**batch, **arguments, max_new_tokens=5).tolist()

    asked = [
        (way, spec) for spec in ("greedy", "spin:suppression=0", "vcd", "sgrs") for way in (answered, streamed, applied)
    ]
    alone, before = [way(spec) for way, spec in asked], state(vlm)
    assert len({str(found) for found in alone[::3]}) > 2
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(way, spec) for way, spec in asked * 2]
    assert [each.result() for each in found] == alone * 2
    assert state(vlm) == before


@pytest.mark.parametrize(
    ("decoder", "left_by"), [("spin:suppression=0", None), ("vcd", KeyboardInterrupt), ("sgrs", None)]
)
def test_a_stream_that_is_left_early_leaves_the_model_as_it_was(decoder, left_by):
    vlm = vlm_of("llava")
    expected, before = answers(vlm, "greedy"), state(vlm)
    pieces = vlm.stream(PICTURES[0], "what?", decoder=decoder, max_new_tokens=400)
    next(pieces)
    if left_by is None:
        pieces.close()
    else:
        with pytest.raises(left_by):
            pieces.throw(left_by)
    assert state(vlm) == before
    assert turn_of(vlm.model).owner is None
    assert answers(vlm, "greedy") == expected


def test_a_stream_that_is_not_closed_makes_others_wait():
    vlm = vlm_of("llava")
    expected = answers(vlm, "greedy")
    pieces = vlm.stream(PICTURES[0], "what?", decoder="spin:suppression=0", max_new_tokens=40)
    first = next(pieces)
    assert answers(vlm, "greedy") == expected
    whole = vlm.generate([PICTURES[0]], "what?", decoder="spin:suppression=0", max_new_tokens=40)[0].text
    assert (first + "".join(pieces)).strip() == whole


def test_two_streams_in_turns_say_what_each_says_alone():
    vlm = vlm_of("llava")
    specs = ("spin:suppression=0", "greedy")
    alone = ["".join(vlm.stream(PICTURES[0], "what?", decoder=spec, max_new_tokens=12)) for spec in specs]
    streams = [vlm.stream(PICTURES[0], "what?", decoder=spec, max_new_tokens=12) for spec in specs]
    said = ["", ""]
    ended = [False, False]
    while not all(ended):
        for number, stream in enumerate(streams):
            piece = next(stream, None)
            ended[number] = piece is None
            said[number] += piece or ""
    assert said == alone


def test_a_stream_inside_a_block_of_the_same_thread_is_refused():
    vlm = vlm_of("llava")
    with (
        parse("locore").applied(vlm, batch_of(vlm)),
        pytest.raises(IncompatibleDecodersError, match="a stream inside a block"),
    ):
        next(vlm.stream(PICTURES[0], "what?"))


def test_a_failure_gives_the_model_back():
    vlm = vlm_of("llava")
    with pytest.raises(ZeroDivisionError), parse("locore").applied(vlm, batch_of(vlm)):
        raise ZeroDivisionError
    assert turn_of(vlm.model).owner is None
    assert not turn_of(vlm.model).mine
