"""The passes of the loop give the logits that transformers' generate gives, for every kind of method and family."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import (
    PICTURES,
    PROMPTS,
    STRONG,
    batch_of,
    close,
    crossed,
    logits,
    method_of,
    unlike,
    vlm_of,
)
from vlmfix.decoding.running import running
from vlmfix.models.layout import Batch

STEPS = 3


def at_work(vlm, batch: Batch, spec, limit=STEPS, **options):
    layout = vlm.layout(batch)
    method = method_of(spec)
    return running(vlm, batch, layout, method.plan(vlm, batch, layout), limit=limit, name=method.spec(), **options)


@torch.no_grad()
def forced(call, tokens):
    """(steps, L, V) scores, after the prompt and after each of the (L, steps - 1) tokens but the last."""
    return torch.stack([call.prompt(), *(call.token(column) for column in tokens.T)])


def following(vlm, batch, spec):
    """Tokens for all rows, and the scores that transformers' loop has for them."""
    expected = logits(vlm, batch, spec, steps=STEPS)
    image, ends = vlm.family.image_token(vlm.model.config), vlm.model.generation_config.eos_token_id
    allowed = expected.clone()
    allowed[..., [image, *([ends] if isinstance(ends, int) else ends)]] = float("-inf")
    return allowed.argmax(dim=-1)[:-1].T, expected


@pytest.mark.parametrize(("family", "name"), crossed(STRONG, turn=1))
def test_the_scores_are_those_of_generate(family, name):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    tokens, expected = following(vlm, batch, STRONG[name])
    with at_work(vlm, batch, STRONG[name]) as call:
        close(forced(call, tokens), expected)


@pytest.mark.parametrize(("family", "name"), crossed(STRONG, turn=2))
@torch.no_grad()
def test_a_line_that_stays_does_not_notice_that_others_leave(family, name):
    """The longer of two prompts ends, and what the padded one says is what it says alone, and twice side by side."""
    vlm = vlm_of(family)
    whole, alone = batch_of(vlm), batch_of(vlm, [0])
    tokens, _ = following(vlm, alone, STRONG[name])
    with at_work(vlm, alone, STRONG[name]) as call:
        expected = forced(call, tokens)[:, 0]
    with at_work(vlm, whole, STRONG[name]) as call:
        first = call.prompt()
        call.keep(torch.tensor([1, 0]))
        call.keep(torch.tensor([1, 1]))
        later = [call.token(column.repeat(2)) for column in tokens.T]
    close(first[0], expected[0])
    for step, scores in enumerate(later, start=1):
        close(scores[0], expected[step])
        close(scores[1], expected[step])


@pytest.mark.parametrize("family", unlike())
@torch.no_grad()
def test_lines_go_back_by_tokens_of_their_own(family):
    """Behind a detour each line continues as without it, with an edit and branches at work; then both go on alike."""
    vlm, spec = vlm_of(family), "locore:strength=4+vcd:plausibility=0"
    batch = batch_of(vlm)
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with at_work(vlm, batch, spec, STEPS + 3) as call:
        expected = forced(call, tokens)  # behind 0 to 4 tokens
    with at_work(vlm, batch, spec, STEPS + 3, reorders=True) as call:
        call.prompt()
        for column in ([5, 9], [6, 20], [21, 22]):
            call.token(torch.tensor(column))
        call.back(torch.tensor([1, 2]))
        assert call.cache.get_seq_length() == batch.length + 2
        scores = call.token(torch.tensor([7, 10]))
        close(scores[0], expected[3, 0])
        close(scores[1], expected[2, 1])
        call.back(torch.tensor([1, 0]))
        scores = call.token(torch.tensor([7, 11]))
        close(scores, expected[3])
        call.back(torch.tensor([1, 3]))
        call.keep(torch.tensor([1]))
        call.back(torch.tensor([0]))
        assert call.cache.get_seq_length() == batch.length
        close(call.token(tokens[1:, 0])[0], expected[1, 1])


@torch.no_grad()
def test_a_call_leaves_the_model_as_it_was():
    vlm = vlm_of("qwen2_5_vl")
    batch = vlm.encode(PROMPTS, PICTURES)
    before = [sorted(module.__dict__) for module in vlm.model.modules()]
    with pytest.raises(ZeroDivisionError), at_work(vlm, batch, STRONG["chain"]) as call:
        call.prompt(1 / 0)
    assert [sorted(module.__dict__) for module in vlm.model.modules()] == before
