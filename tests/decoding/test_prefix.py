"""Rows that begin alike share the pass over their beginning, and nobody can tell from the logits."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from tests.contracts.support import (
    EVERY_ROW,
    PICTURES,
    STRONG,
    close,
    crossed,
    few,
    logits,
    method_of,
    picture,
    unlike,
    vlm_of,
)
from tests.tiny import TINY
from vlmfix.attention.session import continued, edited, first_edited
from vlmfix.decoders import Greedy, base
from vlmfix.decoding import prefix
from vlmfix.decoding.running import running
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.upstream import features, names
from vlmfix.upstream.cache import handed_over

ONE, (TWO, THREE) = PICTURES[0][0], PICTURES[1]
ROWS = [[ONE]] * 3 + [[TWO, THREE]] * 3 + [[picture(9, (33, 44))], []]
QUESTIONS = [
    "what is here?",
    "a dog?",
    "is there a very large elephant in this picture, or two?",
    "red?",
    "and is there a dog in one of these two pictures?",
    "which",
    "what on earth is this picture of",
    "hi there",
]
"""Two groups of three, their questions of different lengths, a picture of its own and a row without one."""
METHODS = {"greedy": "greedy", **STRONG}
LOOKING = ("avisc", "mod")
"""Methods that read the prompt once more, to see where the model looks."""
SHARING = {name: method for name, method in METHODS.items() if name not in (*EVERY_ROW, *LOOKING)}


@contextmanager
def counted(vlm):
    """Prompt tokens that pass through the text decoder, pass by pass."""
    passes = []

    def count(layer, args, kwargs):
        hidden = names.hidden(args, kwargs)
        if hidden.shape[1] > 1:
            passes.append(hidden.shape[0] * hidden.shape[1])

    with vlm.family.layers(vlm.model)[0].register_forward_pre_hook(count, with_kwargs=True):
        yield passes


@pytest.fixture
def unshared(monkeypatch):
    """Runs something as it was before rows shared anything."""

    def run(work, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(base, "prompts_of", lambda *_, **__: None)
            return work(*args, **kwargs)

    return run


def mixed(vlm, rows=range(8)):
    return vlm.encode([QUESTIONS[row] for row in rows], [ROWS[row] for row in rows])


@pytest.mark.parametrize(("family", "name"), crossed(SHARING, turn=1))
def test_a_batch_that_shares_equals_each_row_alone_and_costs_less(family, name, unshared):
    vlm = vlm_of(family)
    batch = mixed(vlm)
    with counted(vlm) as whole:
        apart = unshared(logits, vlm, batch, METHODS[name], steps=2)
    with counted(vlm) as passes:
        together = logits(vlm, batch, METHODS[name], steps=2)
    close(together, apart)
    assert (len(whole), len(passes)) == (1, 2)
    assert sum(passes) < whole[0]
    for row in (1, 3, 6):
        alone = unshared(logits, vlm, mixed(vlm, [row]), METHODS[name], steps=2)
        close(together[:, row], alone[:, 0])


@pytest.mark.parametrize("name", EVERY_ROW)
def test_a_method_that_changes_the_pictures_rows_runs_as_ever(name):
    vlm = vlm_of("llava")
    batch = mixed(vlm)
    with counted(vlm) as passes:
        together = logits(vlm, batch, METHODS[name], steps=2)
    assert passes[-1] % batch.length == 0
    for row in (1, 6):
        close(together[:, row], logits(vlm, mixed(vlm, [row]), METHODS[name], steps=2)[:, 0])


@pytest.mark.parametrize("family", unlike())
@pytest.mark.parametrize("name", ["greedy", "var", "chain"])
@pytest.mark.parametrize("rows", [range(8), (0, 0)], ids=["padded", "unpadded"])
def test_a_static_cache_equals_the_dynamic_one(family, name, rows):
    vlm = vlm_of(family)
    batch = mixed(vlm, rows)
    dynamic = logits(vlm, batch, METHODS[name])
    with counted(vlm) as passes:
        static = logits(vlm, batch, METHODS[name], cache_implementation="static")
    close(static, dynamic)
    assert len(passes) == 2


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", ["greedy", "locore", "chain"])
def test_beams_share_their_prompt(family, name, unshared):
    vlm = vlm_of(family)
    batch = mixed(vlm, (0, 1, 6))

    def search():
        with method_of(METHODS[name]).applied(vlm, batch, num_beams=2) as arguments:
            return vlm.model.generate(
                **batch,
                **arguments,
                num_beams=2,
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )

    with counted(vlm) as passes:
        shared = search()
    with counted(vlm) as whole:
        apart = unshared(search)
    assert (len(passes), len(whole)) == (2, 1)
    assert sum(passes) < whole[0]
    assert torch.equal(shared.sequences, apart.sequences)
    close(shared.sequences_scores, apart.sequences_scores)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=() if not options or name in few(METHODS) else pytest.mark.product)
        for name in METHODS
        for options in ({}, {"temperature": 1.2}, {"num_beams": 2}, {"static_cache": True})
        if not (name == "icd" and "static_cache" in options)  # its branch is longer than a static cache
    ],
    ids=str,
)
def test_answers_are_those_of_each_row_alone(name, options, unshared):
    vlm = vlm_of("llava")
    call = {"decoder": METHODS[name], "max_new_tokens": 4, **options}
    together = vlm.generate(ROWS, QUESTIONS, **call)
    for row in (0, 2, 4, 6):  # of either group, and the picture of its own
        (alone,) = unshared(vlm.generate, [ROWS[row]], [QUESTIONS[row]], **call)
        assert together[row].ids == alone.ids


def test_the_beginning_runs_once_per_picture_and_the_rest_once_per_row():
    vlm = vlm_of("llava")
    batch = mixed(vlm, (0, 1, 2, 6))
    begin = "USER: <image>\nwhat is here? "
    text = vlm.processor.tokenizer
    same = len(text(begin.split("<image>")[0]).input_ids) + 25 + 1  # up to the newline behind the picture
    start = int((batch.length - batch.attention_mask.sum(dim=1)[:3]).min()) + same
    longest = batch.length - start
    with counted(vlm) as passes:
        logits(vlm, batch, steps=1)
    assert passes == [2 * start, 4 * longest]


def test_branches_with_the_same_picture_share_as_well():
    """INTER asks about the picture and its noise, each with and without the question."""
    vlm = vlm_of("llava")
    batch = mixed(vlm, [2])
    with counted(vlm) as passes:
        logits(vlm, batch, "inter", steps=1)
    assert len(passes) == 2
    assert passes[0] + passes[1] < 4 * batch.length


@pytest.mark.parametrize("name", ["greedy", "var", "vcd"])
def test_different_pictures_run_as_ever(name):
    vlm = vlm_of("llava")
    batch = vlm.encode(["what?", "who?"], [[ONE], [picture(1, (40, 60))]])
    decoder = vlm.family.decoder(vlm.model)
    with counted(vlm) as passes, method_of(METHODS[name]).applied(vlm, batch) as arguments:
        assert "forward" not in decoder.__dict__
        vlm.model.generate(**batch, **arguments, max_new_tokens=1)
    assert len(passes) == 1


def test_equal_pictures_whose_pixels_differ_do_not_share(unshared):
    vlm = vlm_of("llava")
    batch = mixed(vlm, (0, 1, 2))
    pixels = batch["pixel_values"].clone()
    pixels[1] += torch.linspace(-1, 1, 40)
    changed = batch.with_inputs(pixel_values=pixels)
    close(logits(vlm, changed), unshared(logits, vlm, changed))


def test_what_comes_from_a_users_own_processor_does_not_share():
    vlm = vlm_of("llava")
    with counted(vlm) as passes:
        logits(vlm, dict(mixed(vlm)), steps=1)
    assert len(passes) == 1


def test_a_sliding_window_inside_the_prompt_is_not_cut(monkeypatch, unshared):
    vlm = vlm_of("gemma3")
    monkeypatch.setattr(vlm.model.config.text_config, "sliding_window", 40)
    batch = mixed(vlm)
    assert batch.length > 40
    for options in ({}, {"cache_implementation": "static"}):
        with counted(vlm) as passes:
            together = logits(vlm, batch, **options)
        assert len(passes) == 1
        close(together, unshared(logits, vlm, batch, **options))


def test_rotary_embeddings_that_depend_on_the_length_are_not_cut(monkeypatch):
    vlm = vlm_of("llava")
    config = vlm.family.decoder(vlm.model).config
    monkeypatch.setattr(config, "rope_parameters", {**config.rope_parameters, "rope_type": "dynamic"})
    with counted(vlm) as passes:
        logits(vlm, mixed(vlm), steps=1)
    assert len(passes) == 1


def test_hidden_states_that_are_asked_for_are_whole():
    vlm = vlm_of("llava")
    batch = mixed(vlm)
    with Greedy().applied(vlm, batch) as arguments:
        output = vlm.model.generate(
            **batch, **arguments, max_new_tokens=1, output_hidden_states=True, return_dict_in_generate=True
        )
    assert output.hidden_states[0][1].shape[1] == batch.length


def test_the_decoder_is_itself_after_the_first_call_and_after_an_exception():
    vlm = vlm_of("llava")
    batch, decoder = mixed(vlm), vlm.family.decoder(vlm.model)
    with Greedy().applied(vlm, batch) as arguments:
        assert "forward" in decoder.__dict__
        vlm.model.generate(**batch, **arguments, max_new_tokens=1)
        assert "forward" not in decoder.__dict__
    with pytest.raises(ZeroDivisionError), Greedy().applied(vlm, batch):
        raise ZeroDivisionError
    assert "forward" not in decoder.__dict__


def test_a_forward_of_the_users_own_is_kept(monkeypatch):
    vlm = vlm_of("llava")
    batch, decoder = mixed(vlm), vlm.family.decoder(vlm.model)
    own, lengths = decoder.forward, []

    def forward(**kwargs):
        lengths.append(kwargs[names.TextNames.of(decoder).embeds].shape[1])
        return own(**kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    expected = logits(vlm, batch, steps=2)
    assert decoder.forward is forward
    assert len(lengths) == 3
    monkeypatch.delattr(decoder, "forward")
    close(logits(vlm, batch, steps=2), expected)


def test_no_edit_may_act_on_what_is_in_the_cache():
    vlm = vlm_of("llava")
    batch = mixed(vlm, [0])
    layout = vlm.layout(batch)
    edits = method_of(STRONG["head-gains"]).plan(vlm, batch, layout).edits
    assert first_edited(vlm) is None
    with edited(vlm, layout, edits):
        first = first_edited(vlm)
        assert first == int(layout.text_after_image()[0].nonzero()[0])
        with continued(vlm, first, {}):
            pass
        with pytest.raises(UnsupportedAttentionError, match=f"column {first} of the prompt is edited, but {first + 1}"):
            continued(vlm, first + 1, {}).__enter__()


@torch.no_grad()
def test_a_continuation_that_nobody_announced_is_refused():
    vlm = vlm_of("llava")
    batch = mixed(vlm, [0])
    layout = vlm.layout(batch)
    edits = method_of(STRONG["head-gains"]).plan(vlm, batch, layout).edits
    behind, start = handed_over(vlm.model, DynamicCache()), 5
    vlm.model(input_ids=batch["input_ids"][:, :start], **behind)
    rest, pictures = batch["input_ids"][:, start:], features.encoded(vlm.model, batch)
    with edited(vlm, layout, edits), pytest.raises(UnsupportedAttentionError, match="behind a cache of 5"):
        vlm.model(input_ids=rest, **behind, **features.handed_over(vlm.model, pictures))


def test_prompts_padded_on_the_right_are_not_cut():
    vlm = vlm_of("llava")
    batch = mixed(vlm, (0, 1))
    assert prefix.prompts_of(vlm, batch, []) is not None
    flipped = batch.with_inputs(**{name: batch[name].flip(1) for name in ("input_ids", "attention_mask")})
    assert prefix.prompts_of(vlm, flipped, []) is None


RESIDUAL = ("var", "chain")
"""Methods that read the residual stream of every column."""
BEHIND = ("greedy", "vcd", "inter", "spin", "locore")
"""Methods that change nothing before the end of the pictures."""
PIECEWISE = [(family, "inter") for family in TINY] + [
    (family, name) for family in ("llava", "qwen2_5_vl") for name in METHODS
]


@pytest.mark.parametrize(("family", "name"), sorted(set(PIECEWISE)))
@pytest.mark.parametrize("rows", [(0, 3, 4, 7), (6,)], ids=["padded", "unpadded"])
def test_a_long_prefill_in_pieces_equals_the_whole_one(family, name, rows, monkeypatch):
    """The last piece has every edited column, which may be all; pictures of Gemma 3 are not cut."""
    vlm, (method, batch) = vlm_of(family), (METHODS[name], mixed(vlm_of(family), rows))
    with counted(vlm) as whole:
        expected = scored(vlm, batch, method)
    monkeypatch.setattr(prefix, "PIECE", 24 * len(rows))
    monkeypatch.setattr(prefix, "COLUMNS", 2)
    with counted(vlm) as passes:
        found = scored(vlm, batch, method)
    close(found, expected)
    assert sum(passes) == sum(whole)
    if family == "gemma3" or name in (*EVERY_ROW, *RESIDUAL):
        assert passes[-1] == whole[-1], "what a plan reads of the prompt beforehand may come in pieces"
    elif name in BEHIND:
        assert len(passes) > len(whole)
        assert max(passes[:-1]) <= prefix.PIECE


@torch.no_grad()
def scored(vlm, batch, spec):
    """Scores of our loop that follow the prompts and one more token."""
    method, layout = method_of(spec), vlm.layout(batch)
    with running(vlm, batch, layout, method.plan(vlm, batch, layout), limit=4, name=spec) as call:
        return torch.stack([call.prompt(), call.token(torch.full((batch.rows,), 7))])


@pytest.mark.parametrize("family", unlike())
@pytest.mark.parametrize("name", ["m3id", "pai"])
def test_a_row_of_text_passes_without_the_padding_before_it(family, name, monkeypatch):
    vlm = vlm_of(family)
    batch = vlm.encode(["dog?", "is it red?"], [[TWO, THREE, ONE], [picture(9, (33, 44)), ONE, TWO]])

    def said(share):
        monkeypatch.setattr(prefix, "PADDING", share)
        layout = vlm.layout(batch)
        plan = method_of(METHODS[name]).plan(vlm, batch, layout)
        with counted(vlm) as passes, running(vlm, batch, layout, plan, limit=4, name=name) as call:
            scores = [call.prompt(), *(call.token(torch.tensor(tokens)) for tokens in ((5, 6), (7, 8), (9, 10)))]
        return torch.stack(scores), passes

    (whole, uncut), (short, cut) = said(2.0), said(0.05)
    close(short, whole)
    assert (len(cut), len(uncut)) == (2, 1)
    assert sum(cut) < 0.9 * uncut[0]


def test_prompts_of_about_one_length_pass_together():
    """A further pass costs more than a little padding."""
    vlm = vlm_of("llava")
    batch = vlm.encode(["dog?", "is it red?"], [[TWO], [picture(9, (33, 44))]])
    plan = method_of("greedy").plan(vlm, batch, vlm.layout(batch))
    with counted(vlm) as passes, running(vlm, batch, vlm.layout(batch), plan, limit=2, name="greedy") as call:
        call.prompt()
    assert passes == [2 * batch.length]
