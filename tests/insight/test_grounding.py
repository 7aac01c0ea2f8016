"""Grounding: the scores of an answer's tokens, against the full computation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.attention.test_saliency import TOKENS, slow
from tests.contracts.support import PICTURES, PROMPTS, STRONG, batch_of, vlm_of
from tests.tiny import TINY
from vlmfix.decoders import parse
from vlmfix.errors import DataError, UnsupportedAttentionError
from vlmfix.heads.measure import profile
from vlmfix.insight.grounding import grounding

ANSWERS = tuple(TOKENS.tolist())


def of(vlm, answers=ANSWERS, rows=(0, 1), **options):
    return grounding(vlm, [PICTURES[row] for row in rows], [PROMPTS[row] for row in rows], answers, **options)


@pytest.mark.parametrize("family", TINY)
def test_scores_are_means_of_the_full_computation(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    layout, prompt = vlm.layout(batch), batch.length
    found = of(vlm)
    for place, (_, matrices) in enumerate(slow(vlm, batch)):
        rows = matrices[:, :, -1].mean(dim=0)  # (B, K)
        for row, answer in enumerate(found):
            full = rows[row].float()
            got = answer.rows[place]
            torch.testing.assert_close(got[: len(full)], full, atol=1e-4, rtol=0)
            assert got[len(full) :].eq(0).all()
            want = full[:prompt][layout.tokens[row]].mean()
            torch.testing.assert_close(answer.picture[place], want, atol=1e-4, rtol=0)
            want = full[:prompt][layout.text[row]].mean()
            torch.testing.assert_close(answer.prompt[place], want, atol=1e-4, rtol=0)
            if place:
                torch.testing.assert_close(answer.earlier[place], full[prompt:].mean(), atol=1e-4, rtol=0)
                torch.testing.assert_close(answer.preceding[place], full[-1], atol=1e-4, rtol=0)
    assert all(answer.earlier[0].isnan() and answer.preceding[0].isnan() for answer in found)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_an_answer_does_not_depend_on_its_neighbours(family):
    vlm = vlm_of(family)
    answers = [[40], [70, 45, 33, 50]]
    together = of(vlm, answers)
    assert [answer.rows.shape[0] for answer in together] == [1, 4]
    for row in (0, 1):
        alone = of(vlm, [answers[row]], [row])[0]
        for name in ("picture", "prompt", "earlier", "preceding"):
            torch.testing.assert_close(
                getattr(together[row], name), getattr(alone, name), atol=1e-5, rtol=1e-4, equal_nan=True
            )


def test_text_is_split_as_it_stands_alone_and_layers_are_a_choice():
    vlm = vlm_of("llava")
    text = "a dog"
    ids = vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    one, two = of(vlm, [text], [0])[0], of(vlm, [ids], [0])[0]
    assert one.tokens == two.tokens == tuple(ids)
    assert "".join(one.texts).replace(" ", "") == "adog"
    torch.testing.assert_close(one.rows, two.rows)
    last = of(vlm, [text], [0], layers="-1")[0]
    assert (last.rows - one.rows).abs().max() > 1e-3
    torch.testing.assert_close(last.rows.norm(dim=1), torch.ones(len(ids)))


def test_an_answer_about_no_picture_owes_it_nothing_that_could_be_measured():
    vlm = vlm_of("llava")
    found = grounding(vlm, [()], "hello there", [[40, 50]])[0]
    assert found.picture.isnan().all()
    assert found.prompt.isfinite().all()


def test_rows_paint_over_the_picture():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    found = of(vlm, [[40, 50]], [0])[0]
    painted = vlm.layout(batch).heatmap(found.rows[1, : batch.length], row=0, image=0, size=(40, 60))
    assert painted.max() > 0


def test_inside_a_block_it_is_that_of_the_edited_model_and_leaves_the_block_as_it_was():
    """Also where an answer ends before another, so that its row leaves the passes."""
    vlm = vlm_of("llava")
    batch, answers = batch_of(vlm), [[40], [70, 45, 33, 50]]
    plain = of(vlm, answers, layers="0")
    with parse(STRONG["locore"]).applied(vlm, batch) as arguments:
        found = of(vlm, answers, layers="0")
        again = vlm.model.generate(**batch, **arguments, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert (found[1].rows - plain[1].rows).abs().max() > 1e-3
    with parse(STRONG["locore"]).applied(vlm, batch_of(vlm, [1])):
        alone = of(vlm, answers[1:], [1], layers="0")
    torch.testing.assert_close(found[1].picture, alone[0].picture, atol=1e-5, rtol=1e-4)
    with parse(STRONG["locore"]).applied(vlm, batch) as arguments:
        fresh = vlm.model.generate(**batch, **arguments, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(again, fresh)


def test_what_cannot_be_measured_is_refused():
    vlm = vlm_of("llava")
    with pytest.raises(DataError, match="2 pictures and 1 answers"):
        of(vlm, [[40]])
    with pytest.raises(DataError, match="answer 1 has the tokens"):
        of(vlm, [[40], []])
    with pytest.raises(DataError, match="answer 0 has the tokens"):
        of(vlm, [[10**6], [40]])
    with pytest.raises(UnsupportedAttentionError, match="3 layers"):
        of(vlm, layers="6:9")


def test_the_model_is_left_as_it_was():
    vlm = vlm_of("llava")
    of(vlm)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vlm.model.parameters())
    assert vlm.model.config.get_text_config()._attn_implementation != "vlmfix"


def test_a_template_that_ends_with_the_picture_is_refused():
    """The prompt's last token passes alone, where it is a placeholder and no picture."""
    vlm = vlm_of("llava")
    processor = copy.copy(vlm.processor)
    processor.chat_template = "{{ messages[0].content[-1].text }}<image>"
    backwards = replace(vlm, processor=processor)
    with pytest.raises(DataError, match="a prompt ends with a picture"):
        grounding(backwards, [PICTURES[0]], "what?", [[5, 6]])
    with pytest.raises(DataError, match="the prompt ends with a picture"):
        profile(backwards, PICTURES[0], ["vhd"])
