"""The front door: answers, streams, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import vlmfix
from tests.contracts.support import PICTURES, PROMPTS, Forced, batch_of, logits, vlm_of
from tests.tiny import tiny_vlm
from vlmfix.decoders import VCD
from vlmfix.errors import DataError, IncompatibleDecodersError, UnsupportedModelError, UsageError
from vlmfix.request import row_seed

ROWS = [list(row) for row in PICTURES]


def test_answers_are_what_generate_says():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    sequences = vlm.model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch.length :]
    answers = vlm.generate(ROWS, PROMPTS, max_new_tokens=5)
    for ids, answer in zip(sequences, answers, strict=True):
        assert answer.text == vlm.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert list(answer.ids) == ids.tolist()
        assert answer.seconds > 0


def test_an_answer_that_ends_and_one_that_is_cut(monkeypatch):
    vlm = vlm_of("llava")
    ids = vlm.generate([ROWS[0]], PROMPTS[0], max_new_tokens=4)
    assert (ids[0].finish, ids[0].tokens) == ("length", 4)
    batch = batch_of(vlm, [0])
    third = vlm.model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch.length + 2]
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [int(third)])
    first = vlm.model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch.length :].tolist()
    (answer,) = vlm.generate([ROWS[0]], PROMPTS[0], max_new_tokens=4)
    assert (answer.finish, answer.tokens) == ("eos", first.index(int(third)) + 1)
    assert answer.ids == tuple(first[: answer.tokens])


def broken_head(vlm, *, row, step):
    """From a step on, the scores of one row are partly not numbers; removed by the caller.

    In the prompt's pass it is the second row, for beams come after it; a row that has ended is there no more.
    """
    calls = []

    def spoil(module, args, output):
        calls.append(None)
        output = output.clone()
        own = row if len(calls) > 1 else 1
        if len(calls) > step and own < len(output):
            output[own, :, 7] = float("nan")
        return output

    return vlm.model.lm_head.register_forward_hook(spoil)


@pytest.mark.parametrize("decoder", ["greedy", "vcd", "vcd+inter:plausibility=0", "locore"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 2}, {"static_cache": True}], ids=str)
@pytest.mark.parametrize("step", [0, 3])
def test_an_answer_from_scores_that_are_no_numbers_says_so(decoder, options, step):
    vlm = vlm_of("llava")
    call = {"decoder": decoder, "max_new_tokens": 4, **options}
    whole = vlm.generate(ROWS, PROMPTS, **call)
    assert "nan" not in [answer.finish for answer in whole]
    with broken_head(vlm, row=options.get("num_beams", 1), step=step):
        answers = vlm.generate(ROWS, PROMPTS, **call)
    assert [answer.finish == "nan" for answer in answers] == [False, True]
    assert answers[0].ids == whole[0].ids
    assert all(answer.tokens == len(answer.ids) for answer in answers)


def test_what_a_finished_row_runs_on_with_does_not_count(monkeypatch):
    vlm = vlm_of("llava")
    free = vlm.generate(ROWS, PROMPTS, max_new_tokens=6)
    end = next(token for token in free[1].ids if token not in free[0].ids)
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [end])
    last = free[1].ids.index(end)
    for step, finish in ((last, "nan"), (last + 1, "eos")):
        with broken_head(vlm, row=1, step=step):
            answers = vlm.generate(ROWS, PROMPTS, max_new_tokens=last + 3)
        assert [answer.finish for answer in answers] == ["length", finish]


def test_one_prompt_serves_all_pictures():
    vlm = vlm_of("llava")
    one = vlm.generate([ROWS[0][0], ROWS[1][0]], PROMPTS[0], max_new_tokens=3)
    two = vlm.generate([[ROWS[0][0]], [ROWS[1][0]]], [PROMPTS[0]] * 2, max_new_tokens=3)
    assert [answer.text for answer in one] == [answer.text for answer in two]


@pytest.mark.parametrize("decoder", ["greedy", "vcd", VCD(contrast=2.0), "sgrs"])
def test_a_stream_says_what_generate_says(decoder):
    vlm = vlm_of("llava")
    pieces = list(vlm.stream(ROWS[0], PROMPTS[0], decoder=decoder, max_new_tokens=6))
    (answer,) = vlm.generate([ROWS[0]], PROMPTS[0], decoder=decoder, max_new_tokens=6)
    assert "".join(pieces).rstrip() == answer.text
    assert all(pieces)


def test_a_stream_that_fails_raises_where_it_is_read():
    vlm = vlm_of("llava")
    with pytest.raises(IncompatibleDecodersError, match="var cannot act"):
        list(vlm.stream(ROWS[0], PROMPTS[0], decoder="var"))


def test_beams_and_a_static_cache():
    vlm = vlm_of("llava")
    beams = vlm.generate(ROWS, PROMPTS, num_beams=3, max_new_tokens=4, decoder="vcd")
    assert [answer.tokens for answer in beams] == [4, 4]
    static = vlm.generate(ROWS, PROMPTS, static_cache=True, max_new_tokens=4, decoder="vcd")
    dynamic = vlm.generate(ROWS, PROMPTS, max_new_tokens=4, decoder="vcd")
    assert [answer.text for answer in static] == [answer.text for answer in dynamic]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, UsageError, "max_new_tokens=0"),
        ({"num_beams": 0}, UsageError, "num_beams=0"),
        ({"seed": -1}, UsageError, "seed=-1"),
        ({"temperature": -1.0}, UsageError, r"temperature=-1\.0"),
        ({"temperature": 1.0, "top_p": 0.0}, UsageError, r"top_p=0\.0"),
        ({"top_p": 0.5}, UsageError, "greedy search has no nucleus"),
        ({"temperature": 1.0, "num_beams": 2}, UsageError, "sample with num_beams=1"),
        ({"decoder": "nothing"}, UsageError, "unknown decoder"),
        ({"prompts": ["one"]}, DataError, "2 pictures and 1 prompts"),
        ({"pictures": [], "prompts": []}, DataError, "0 pictures and 0 prompts"),
    ],
)
def test_what_it_refuses(options, error, message):
    vlm = vlm_of("llava")
    call = {"pictures": ROWS, "prompts": PROMPTS, **options}
    with pytest.raises(error, match=message):
        vlm.generate(call.pop("pictures"), call.pop("prompts"), **call)


def test_sampling_at_a_small_temperature_is_greedy_and_the_nucleus_cuts():
    vlm = vlm_of("llava")
    greedy = vlm.generate(ROWS, PROMPTS, max_new_tokens=4)
    cold = vlm.generate(ROWS, PROMPTS, max_new_tokens=4, temperature=1e-4)
    narrow = vlm.generate(ROWS, PROMPTS, max_new_tokens=4, temperature=1.0, top_p=1e-6)
    assert [a.text for a in cold] == [a.text for a in greedy] == [a.text for a in narrow]


def test_sampling_leaves_the_global_generator_alone():
    vlm = vlm_of("llava")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    vlm.generate([ROWS[0]], PROMPTS[0], max_new_tokens=3, temperature=1.0, decoder="vcd")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_draw_belongs_to_seed_question_and_pictures():
    one, other = PICTURES[1]
    seeds = [
        row_seed(seed, prompt, shown)
        for seed in (0, 1)
        for prompt in ("what?", "who?")
        for shown in ([], [one], [other], [one, other], [other, one])
    ]
    assert len(set(seeds)) == len(seeds)
    assert row_seed(1, "who?", [other.copy(), one.copy()]) == seeds[-1]


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "copies"])
def test_a_row_draws_anew_for_another_picture_and_alike_for_the_same(shared):
    """At this temperature the draw decides nearly alone, and the model's view of the picture nothing."""
    vlm = vlm_of("llava")
    one, other = PICTURES[1]
    shown = [one, other, one if shared else one.copy()]
    first, second, third = vlm.generate(shown, "what is here?", temperature=100.0, max_new_tokens=6, seed=3)
    assert first.ids == third.ids
    assert all(a != b for a, b in zip(first.ids, second.ids, strict=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_questions_about_one_picture_read_it_once(family):
    """Counts the tokens that enter the text decoder's first layer, (rows, tokens) for each pass over a prompt."""
    vlm, shown = vlm_of(family), PICTURES[0][0]
    questions = ["what is here?", "is it a dog?", "is it red?", "which colour?"]
    passes = []

    def count(layer, given, output):
        rows, tokens = (output if isinstance(output, torch.Tensor) else output[0]).shape[:2]
        if tokens > 1:
            passes.append((rows, tokens))

    with vlm.family.layers(vlm.model)[0].register_forward_hook(count):
        together = vlm.generate([shown] * 4, questions, max_new_tokens=2)
        shared = passes.copy()
        passes.clear()
        apart = vlm.generate([shown.copy() for _ in questions], questions, max_new_tokens=2)
    ((all_rows, length),) = passes
    (beginnings, begun), (rows, rest) = shared
    assert (all_rows, beginnings, rows, begun + rest) == (4, 1, 4, length)
    assert begun >= int(vlm.layout(vlm.encode(questions[:1], [[shown]])).tokens.sum())
    assert [answer.ids for answer in together] == [answer.ids for answer in apart]


def test_a_users_own_model():
    tiny = tiny_vlm("llava")
    vlm = vlmfix.wrap(tiny.model, tiny.processor)
    inputs = tiny.processor(
        text=[vlm.render("what is here?", 1)], images=[PICTURES[0][0]], return_tensors="pt", padding=True
    )
    with VCD().applied(vlm, inputs) as arguments:
        own = tiny.model.generate(**inputs, **arguments, max_new_tokens=4, do_sample=False)
    (answer,) = vlm.generate([ROWS[0]], PROMPTS[0], decoder="vcd", max_new_tokens=4)
    fresh = own[0, inputs["input_ids"].shape[1] :]
    assert tiny.processor.tokenizer.decode(fresh, skip_special_tokens=True).strip() == answer.text


def test_wrapping_an_unknown_family(monkeypatch):
    tiny = tiny_vlm("llava")
    monkeypatch.setattr(type(tiny.model.config), "model_type", "mllama")
    with pytest.raises(UnsupportedModelError, match=r"'mllama' is not supported .*llava, llava_next"):
        vlmfix.wrap(tiny.model, tiny.processor)


def test_pictures_of_any_size_and_one_colour():
    vlm = vlm_of("llava")
    odd = [Image.new("RGB", size, "black") for size in ((1, 1), (3000, 15), (15, 3000))]
    assert len(vlm.generate(odd, "what?", max_new_tokens=2, decoder="vcd")) == 3


@pytest.mark.parametrize("spec", ["greedy", "vcd:plausibility=0.3", "apc:plausibility=0.5", "sample:temperature=1.5"])
def test_an_answer_says_how_sure_its_tokens_were(spec):
    """By the scores that the decoder made, before any temperature; tokens that are cut count for nothing."""
    vlm = vlm_of("llava")
    pictures, prompts = [PICTURES[row] for row in (0, 1)], [PROMPTS[row] for row in (0, 1)]
    for row, answer in enumerate(vlm.generate(pictures, prompts, decoder=spec, max_new_tokens=5, seed=3)):
        batch = batch_of(vlm, [row])
        forced = logits(
            vlm,
            batch,
            "greedy" if "sample" in spec else spec,
            steps=answer.tokens,
            logits_processor=[Forced(torch.tensor([answer.ids]), batch.length)],
        )[:, 0].double()
        shares = forced.softmax(-1)
        own = [float(shares[step, token].log()) for step, token in enumerate(answer.ids)]
        spread = [-float((share[share > 0] * share[share > 0].log()).sum()) for share in shares]
        assert answer.logprob == pytest.approx(sum(own) / len(own), abs=1e-4)
        assert answer.entropy == pytest.approx(sum(spread) / len(spread), abs=1e-4)


def test_an_answer_says_of_every_word_how_sure_it_was():
    vlm = vlm_of("llava")
    stop = vlm.generate(ROWS[:1], PROMPTS[0], max_new_tokens=8)[0].text[6:9]
    call = {"max_new_tokens": 8, "stop": stop}
    ((answer,), (plain,)) = (vlm.generate(ROWS[:1], PROMPTS[0], words=words, **call) for words in (True, False))
    assert (answer.ids, plain.words) == (plain.ids, None)
    assert all(answer.text[begin:end].strip() == answer.text[begin:end] != "" for begin, end, _ in answer.words)
    assert all(logprob <= 0 for *_, logprob in answer.words)
    assert vlm.generate(ROWS[:1], PROMPTS[0], max_new_tokens=2, num_beams=2, words=True)[0].words is None


def test_nobody_knows_how_sure_beams_and_static_caches_were():
    vlm = vlm_of("llava")
    for options in ({"num_beams": 2}, {"static_cache": True}):
        (answer,) = vlm.generate([PICTURES[0]], PROMPTS[0], max_new_tokens=3, **options)
        assert (answer.logprob, answer.entropy) == (None, None)
