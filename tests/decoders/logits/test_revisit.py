"""ReVisiT against the slow way of its formula, from the hidden states that transformers returns."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch import nn

from tests.contracts.support import PICTURES, PROMPTS, batch_of, close, extended, logits, plain, vlm_of
from vlmfix.decoders import ReVisiT, parse
from vlmfix.decoders.logits import revisit
from vlmfix.decoders.logits.dola import distances
from vlmfix.decoders.logits.revisit import Product
from vlmfix.generation import load
from vlmfix.jobs.folder import DESCRIBE
from vlmfix.upstream.readout import of_tokens
from vlmfix.world.mentions import mentions
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

STEPS = 3


@torch.no_grad()
def passed(vlm, row, tokens):
    """Of one row without a cache: (steps, V) logits in float64, and the hidden states of its image tokens by layer."""
    batch = batch_of(vlm, [row])
    output = vlm.model(**extended(batch, tokens), use_cache=False, output_hidden_states=True)
    image = vlm.layout(batch).tokens[0].nonzero().flatten().tolist()
    states = [[layer[0, column] for column in image] for layer in output.hidden_states]
    return output.logits[0, batch.length - 1 :].double(), states


def divergence(p, q):
    return sum(float((x * (2 * x / (p + q)).log()).sum()) for x in (p, q)) / 2


def released(p, q):
    middle = (p + q) / 2
    return sum(float((middle * (middle / x).log()).sum()) for x in (p, q))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("spec", "places", "measure"),
    [
        ("plausibility=0.05", lambda count: [count], divergence),
        ("plausibility=0.2,layers=all,strength=0.7", lambda count: range(1, count + 1), divergence),
        ("plausibility=0.1,layers=every-second,mode=official", lambda count: range(count, 0, -2), released),
        ("plausibility=0,strength=2", lambda count: [count], divergence),
    ],
)
@torch.no_grad()
def test_the_image_token_that_agrees_most_is_multiplied(family, spec, places, measure):
    vlm, method = vlm_of(family), parse(f"revisit:{spec}")
    head, share = vlm.model.get_output_embeddings(), method.plausibility
    found = logits(vlm, batch_of(vlm), method, steps=STEPS)  # (steps, B, V)
    said = found.clone()
    said[..., vlm.family.image_token(vlm.model.config)] = -torch.inf
    for row in (0, 1):
        last, states = passed(vlm, row, said[:-1, row].argmax(dim=-1)[None])
        every = [head(state).double() for place in places(vlm.layers) for state in states[place]]
        for step, own in enumerate(last):
            kept = own.softmax(-1) >= share * own.softmax(-1).max()
            p = own[kept].softmax(-1)
            best = min(every, key=lambda one: measure(p, one[kept].softmax(-1)))
            expected = torch.full_like(own, -torch.inf)
            expected[kept] = own[kept] + method.strength * best[kept].log_softmax(-1)
            close(found[step, row].log_softmax(-1), expected.log_softmax(-1).float())


def product(tokens, beams=1):
    vlm = vlm_of("llava")
    given = {"strength": 1.0, "plausibility": 0.5, "swapped": False, "model": vlm.model}
    rows = torch.ones(beams * len(tokens), dtype=torch.bool)
    return vlm, Product(branches=(), rows=rows, tokens=tokens, **given)


def test_one_candidate_is_taken_whatever_the_picture_says():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    found = logits(vlm, batch, ReVisiT(plausibility=1))
    assert ((found > -torch.inf).sum(dim=-1) == 1).all()
    assert torch.equal(found[0].argmax(dim=-1), plain(vlm, batch)[0].argmax(dim=-1))


@torch.no_grad()
def test_neither_padding_nor_text_is_chosen_and_rows_have_candidates_of_their_own():
    """Other columns hold no numbers, the stream is padded as for a longer branch, and each row keeps other tokens."""
    tokens = torch.tensor([[False, True, True, False], [False, False, True, False]])
    vlm, rule = product(tokens, beams=2)
    torch.manual_seed(0)
    states = torch.full((1, 4, 6, vlm.model.get_output_embeddings().in_features), torch.nan)  # two beams of each
    states[:, :2, 3:5] = torch.randn(2, states.shape[-1])
    states[:, 2:, 4] = torch.randn(states.shape[-1])
    rule.view(states)
    clean = torch.zeros(4, vlm.model.config.text_config.vocab_size)
    clean[:, 5] = clean[0, 6] = clean[2, 7] = 9
    kept = rule.keep(torch.tensor([0, 2, 3]))
    found = kept.fuse(clean[[0, 2, 3]], clean[:0], clean[[0, 2, 3]])
    assert [row.isfinite().nonzero().flatten().tolist() for row in found] == [[5, 6], [5, 7], [5]]
    said = vlm.model.get_output_embeddings()(states[0, 2, 4])[[5, 7]].log_softmax(-1)
    close(found[1, [5, 7]], 9 + said)  # there is one image token
    assert rule.begun().seen == []


@torch.no_grad()
def test_where_all_image_tokens_are_alike_it_does_not_matter_which_is_chosen():
    vlm = vlm_of("llava")
    torch.manual_seed(1)
    state = torch.randn(1, 1, 1, vlm.model.get_output_embeddings().in_features)
    clean = torch.randn(1, vlm.model.config.text_config.vocab_size)
    found = []
    for copies in (1, 3):
        _, rule = product(torch.ones(1, copies, dtype=torch.bool))
        rule.view(state.expand(-1, -1, copies, -1))
        found.append(rule.fuse(clean, clean[:0], clean))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_in_a_chain_each_row_says_what_it_says_alone(family):
    """Beside edits, a branch whose prompt is longer, beams, and a row without a picture, which it leaves alone."""
    vlm, chain = vlm_of(family), "locore:strength=2+icd:plausibility=0+revisit:strength=2,layers=all"
    pictures, prompts = [list(PICTURES[0]), list(PICTURES[1]), []], [*PROMPTS, "hello there"]

    def ids(rows, spec=chain, **options):
        given = [pictures[row] for row in rows], [prompts[row] for row in rows]
        return [answer.ids for answer in vlm.generate(*given, decoder=spec, max_new_tokens=5, **options)]

    for options in ({}, {"num_beams": 3}):
        together = ids((0, 1, 2), **options)
        assert together == [ids((row,), **options)[0] for row in (0, 1, 2)]
    assert ids((2,), "revisit") == ids((2,), "greedy")


@torch.no_grad()
def test_the_logits_of_some_tokens_are_those_of_the_head():
    vlm = vlm_of("llava")
    head, states, tokens = nn.Linear(8, 30), torch.randn(3, 8), torch.tensor([2, 7, 29])

    class Model:
        config = vlm.model.config

        def __init__(self, head):
            self.head = head

        def get_output_embeddings(self):
            return self.head

    for own in (head, nn.Sequential(head)):
        close(of_tokens(Model(own), states, tokens), head(states)[:, tokens])
    capped = vlm_of("gemma3").model
    capped.config.text_config.final_logit_softcapping = 3.0
    try:
        own = capped.get_output_embeddings()
        state = torch.randn(own.in_features)
        close(of_tokens(capped, state, tokens), 3 * (own(state)[tokens] / 3).tanh())
    finally:
        capped.config.text_config.final_logit_softcapping = None
    assert math.isfinite(float(own(state).sum()))


def test_on_tiny_the_token_that_agrees_most_serves_best(monkeypatch):
    """The authors' ablation: the choice by agreement, above one by chance, above the one that agrees least."""
    vlm, scenes = load("tiny", device="cpu", dtype="float32"), [scene(4321, number) for number in range(8)]
    shown = [[Image.fromarray(each.permute(1, 2, 0).numpy())] for each in render(scenes)]
    dice = torch.Generator().manual_seed(0)

    def f1(spec, choice):
        """Of objects that captions name, against those that the scenes have."""
        monkeypatch.setattr(revisit, "distances", choice)
        answers = vlm.generate(shown, [DESCRIBE] * len(shown), decoder=spec, max_new_tokens=30)
        pairs = [(set(mentions(answer.text)), set(one.counts())) for answer, one in zip(answers, scenes, strict=True)]
        return (
            2 * sum(len(said & there) for said, there in pairs) / sum(len(said) + len(there) for said, there in pairs)
        )

    best = f1("revisit:strength=3", distances)
    chance = f1("revisit:strength=3", lambda own, said, swapped: torch.rand(len(said), generator=dice))
    worst = f1("revisit:strength=3", lambda own, said, swapped: -distances(own, said, swapped=swapped))
    every = f1("revisit:strength=3,plausibility=0", distances)
    assert best > chance + 0.2 > worst + 0.2
    assert best > every
