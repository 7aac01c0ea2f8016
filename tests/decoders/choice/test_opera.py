"""OPERA against the slow way of its formulas: a full pass in float64 for every look at an answer."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, batch_of, vlm_of
from tests.contracts.test_batches import ASKED, SHOWN
from tests.decoders.whole import whole
from vlmfix.decoders import OPERA, DecodingPlan, parse
from vlmfix.decoders.choice import opera
from vlmfix.decoding.beams import Stand, search
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.running import running
from vlmfix.errors import IncompatibleDecodersError, UsageError


@cache
def looks(family, row):
    """Returns a function of an answer: (V,) logits behind it, (n, n) attention among its tokens, (n,) to images."""
    vlm = vlm_of(family)
    batch = batch_of(vlm, [row])
    layout, last, image = vlm.layout(batch), vlm.layers - 1, vlm.family.image_token(vlm.model.config)

    @cache
    def look(answer):
        seen = {}

        def edit(here):
            causal = torch.ones(here.scores.shape[-2:], dtype=torch.bool).tril()
            weights = here.scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)
            if here.layer == last:
                seen["square"] = weights.amax(dim=0)
                seen["image"] = here.image
            return weights @ here.values

        logits = whole(vlm, batch, torch.tensor([answer], dtype=torch.long), edit)[-1].double()
        logits[image] = logits.min()
        square = seen["square"] / seen["square"].sum(dim=-1, keepdim=True)
        answers = slice(batch.length, None)
        return logits, square[answers, answers], square[answers][:, seen["image"]].sum(dim=-1)

    assert layout.tokens.shape[1] == batch.length
    return look


def mode(values):
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def slow(look, method, ends, limit, early):
    """Searches as the specification says. Returns the best answer, its score, and from where to where it went back."""
    code = method.preset == "official-code"
    state = {"growing": [()], "sums": [0.0], "ended": []}
    states, notes, chosen, returns, rejected, backs = [], [], [], Counter(), {}, []
    while True:
        said = len(state["growing"][0])
        scores, pointed = [], []
        for answer in state["growing"]:
            logits, _, _ = look(answer)
            row_scores = torch.full_like(logits, -999.0 if code else -math.inf)
            own = []
            for token in logits.topk(method.candidates).indices.tolist():
                _, square, image = look((*answer, token))
                scaled = method.scale * square
                products = torch.stack([1e-7 * scaled[c:, c].prod() for c in range(said + 1)])
                products = products.half() if code else products
                own.append(int(products.max(dim=0).indices))
                lost = -image[-1] if said + 1 <= early else products.max().double()
                row_scores[token] = logits[token] - method.penalty * lost
            scores.append(row_scores)
            pointed.append(mode(own))
        pointed *= method.num_beams // len(pointed)
        states.append(state)
        notes.append(pointed)
        place = mode(pointed)
        often = min(sum(note[beam] == place for note in notes) for beam in range(method.num_beams))
        to = None
        if often > method.threshold and place >= early:
            free = [one for one in (place + 1, place) if returns[one] < method.candidates]
            if free:
                returns[free[0]] += 1
                to = max(min(free[0], said - 1), said - method.window, 1)
        if to is not None:
            backs.append((said, to))
            rejected.setdefault(to, []).extend(chosen[to])
            for later in list(rejected):
                if later == to + 1 or (later > to and not code):
                    del rejected[later]
            del states[to + 1 :], notes[to + 1 :], chosen[to:]
            state = states[to]
            scores = [look(answer)[0].clone() for answer in state["growing"]]
            for beam, token in rejected[to]:
                scores[beam][token] = scores[beam].min()
        totals = torch.stack([one.log_softmax(-1) + total for one, total in zip(scores, state["sums"], strict=True)])
        state = grown(state, totals, method.num_beams, ends, limit, chosen)
        if state["growing"] == []:
            best = max(state["ended"], key=lambda pair: pair[0])
            return best[1], best[0], backs


def grown(state, totals, beams, ends, limit, chosen):
    vocabulary = totals.shape[1]
    values, places = totals.flatten().topk(min(max(2, 1 + len(ends)) * beams, totals.numel()))
    new = {"growing": [], "sums": [], "ended": list(state["ended"])}
    pairs = []
    for rank, (total, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        beam, token = divmod(place, vocabulary)
        answer = (*state["growing"][beam], token)
        if token in ends or len(answer) == limit:
            if rank < beams:
                new["ended"] = sorted([*new["ended"], (total / len(answer), answer)], key=lambda pair: -pair[0])[:beams]
        elif len(pairs) < beams:
            new["growing"].append(answer)
            new["sums"].append(total)
            pairs.append((beam, token))
    chosen.append(pairs)
    if pairs and len(new["ended"]) == beams and new["sums"][0] / len(new["growing"][0]) <= new["ended"][-1][0]:
        new["growing"] = []
    return new


@dataclass(frozen=True, eq=False, kw_only=True)
class Least(Contrast):
    """Makes a token the least probable: the one for pictures, which no pass without a cache takes in an answer."""

    token: int

    def fuse(self, clean, others, scores):
        least = scores.clone()
        least[:, self.token] = scores.amin(dim=1)
        return least


@torch.no_grad()
def ours(vlm, rows, method, ends, limit):
    batch = batch_of(vlm, rows)
    layout = vlm.layout(batch)
    image = vlm.family.image_token(vlm.model.config)
    rule = Least(branches=(), rows=torch.ones(batch.rows, dtype=torch.bool), token=image)
    plan = DecodingPlan(contrasts=(rule,)).merged(method.plan(vlm, batch, layout))
    with running(vlm, batch, layout, plan, limit=limit, name=method.spec(), reorders=True) as call:
        return search(call, method.num_beams, ends, plan.leader(call))


@pytest.mark.parametrize(
    ("family", "early", "spec", "limit", "ends", "steps"),
    [
        ("llava", 10, "num_beams=2,candidates=2,scale=100", 16, 0, 1),
        ("qwen2_5_vl", 10, "num_beams=2,candidates=2,scale=50", 16, 0, 1),
        ("qwen2_5_vl", 10, "preset=official-code,num_beams=2,candidates=2,scale=100", 16, 0, 2),
        ("llava", 3, "num_beams=3,candidates=2,scale=50", 11, 0, 5),
        ("llava", 3, "num_beams=2,candidates=3,scale=200,window=2", 11, 9, 1),
        ("llava", 3, "preset=official-code,num_beams=2,candidates=3,scale=130,penalty=0.5", 11, 0, 5),
        ("qwen2_5_vl", 3, "num_beams=2,candidates=3,scale=100", 11, 0, 3),
    ],
)
def test_it_finds_what_full_passes_find(monkeypatch, family, early, spec, limit, ends, steps):
    """Two rows together, each against its own slow search; some sample goes back, and not all in the same way.

    ``ends`` is the share of the vocabulary that ends an answer, ``steps`` the furthest way back.
    """
    monkeypatch.setattr(opera, "EARLY", early)
    method, vlm, ended = parse(f"opera:{spec},threshold=1"), vlm_of(family), list(range(0, 260, ends)) if ends else []
    backs = []
    for row, found in enumerate(ours(vlm, (0, 1), method, ended, limit)):
        answer, score, back = slow(looks(family, row), method, ended, limit, early)
        assert found.answer == answer
        assert found.score == pytest.approx(score, abs=1e-5)
        backs.append(back)
    assert backs[0] != backs[1]
    assert max(said - to for row in backs for said, to in row) >= steps


def test_the_fast_preset_is_greedy_search_until_it_goes_back():
    vlm = vlm_of("llava")
    asked = {"pictures": [list(row) for row in PICTURES], "prompts": list(PROMPTS), "max_new_tokens": 6}
    fast, greedy = (vlm.generate(**asked, decoder=spec) for spec in ("opera:preset=fast", "greedy"))
    assert [answer.ids for answer in fast] == [answer.ids for answer in greedy]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("others", "options"),
    [("locore:strength=2+vcd:plausibility=0", {}), ("sid+revisit", {"repetition_penalty": 1.2})],
)
def test_in_a_chain_each_row_says_what_it_says_alone(family, others, options, monkeypatch):
    """Beside edits, branches, rules, a penalty on repetition and a longer neighbour, and while samples go back."""
    monkeypatch.setattr(opera, "EARLY", 3)
    backs, real = [], opera.Past.take_back

    def noted(past, place, **given):
        backs.append(place)
        return real(past, place, **given)

    monkeypatch.setattr(opera.Past, "take_back", noted)
    vlm, chain = vlm_of(family), f"opera:num_beams=2,candidates=2,scale=100,threshold=1+{others}"

    def ids(rows):
        pictures, prompts = [list(PICTURES[row]) for row in rows], [PROMPTS[row] for row in rows]
        answers = vlm.generate(pictures, prompts, decoder=chain, max_new_tokens=12, **options)
        return [answer.ids for answer in answers]

    assert ids((0, 1)) == ids((0,)) + ids((1,))
    assert backs


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_eight_samples_go_back_each_for_itself(family, monkeypatch):
    monkeypatch.setattr(opera, "EARLY", 3)
    backs, real = Counter(), opera.Past.take_back

    def noted(past, place, **given):
        backs[id(past)] += 1
        return real(past, place, **given)

    vlm, spec = vlm_of(family), "opera:num_beams=2,candidates=2,scale=100,threshold=1"

    def ids(shown, asked):
        return [answer.ids for answer in vlm.generate(shown, asked, decoder=spec, max_new_tokens=14)]

    with monkeypatch.context() as patch:
        patch.setattr(opera.Past, "take_back", noted)
        together = ids(SHOWN, list(ASKED))
    assert together == [ids([shown], [asked])[0] for shown, asked in zip(SHOWN, ASKED, strict=True)]
    assert len({*backs.values()}) > 1  # not all as often


def past(noted, returns=()):
    """A sample that has noted these tokens at its steps, for two beams."""
    made = opera.Past(torch.zeros(2, len(noted) - 1))
    made.stands = [(Stand(chosen=((step, 7),)), torch.zeros(2, step)) for step in range(len(noted))]
    made.noted, made.returns = list(noted), Counter(returns)
    return made


def test_when_and_where_a_sample_goes_back():
    method = OPERA(threshold=2, candidates=2)
    never, often = [(0, 0)] * 20, [(12, 12)] * 3
    assert past([*never, *often]).place(method) == 13
    assert past([*never, (12, 12), (12, 12), (12, 11)]).place(method) is None  # the second beam, twice
    assert past([*never, (9, 9), (9, 9), (9, 9)]).place(method) is None  # among the first ten tokens
    assert past([*never, *often, (12, 12)]).place(method) == 13
    assert past([*never, *often], {13: 2}).place(method) == 12
    assert past([*never, *often], {13: 2, 12: 2}).place(method) is None
    assert past([*never, *often]).place(OPERA(threshold=2, candidates=2, window=4)) == 18
    for beams, expected in (((11, 12), 11), ((12, 11), 11), ((13, 13), 13)):
        assert opera._most(beams) == expected


@pytest.mark.parametrize(("forgets", "left"), [(True, {13: 2}), (False, {13: 2, 15: 1})])
def test_what_is_forgotten_on_the_way_back(forgets, left):
    one = past([(0, 0)] * 20)
    one.rejected.update({13: [(1, 1)], 14: [(2, 2)], 15: [(3, 3)]})
    stand = one.take_back(13, forgets=forgets)
    assert stand.chosen == ((13, 7),)
    assert (len(one.stands), len(one.noted), one.sums.shape) == (14, 14, (2, 13))
    assert {place: len(pairs) for place, pairs in one.rejected.items()} == left
    assert one.rejected[13] == [(1, 1), (14, 7)]


def test_scores_that_float16_cannot_hold():
    """In the released code's arithmetic two are infinite and one is 0, and the first of equal ones is taken."""
    image, sums = torch.zeros(2), torch.full((2, 11), -200.0)
    sums[0, 3], sums[0, 4], sums[1, 5] = 40.0, 600.0, -5.0
    found = {}
    for preset in ("paper", "official-code"):
        method = OPERA(preset=preset)
        found[preset], places = opera.Retrospection(None, method, None)._penalty(sums, image)
        assert places.tolist() == ([4, 5] if preset == "paper" else [3, 0])
    assert found["official-code"].tolist() == [math.inf, 0.0]
    assert found["paper"].tolist() == pytest.approx([1e30, 1e-7 * math.exp(-5)], rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "options", "reason"),
    [
        ("opera:num_beams=1", {}, "num_beams"),
        ("opera+beam:num_beams=3", {}, "beam"),
        ("opera+sample", {}, "sample"),
        ("opera", {"num_beams": 3}, "num_beams=3"),
        ("opera", {"temperature": 1.0}, "temperature=1"),
        ("opera+m3id", {}, "goes back to earlier tokens"),
        ("opera+sgrs", {}, "sgrs"),
        ("opera", {"static_cache": True}, "leads a beam search of its own"),
    ],
)
def test_what_it_does_not_go_with(spec, options, reason):
    vlm = vlm_of("llava")
    with pytest.raises((UsageError, IncompatibleDecodersError), match=reason):
        vlm.generate([list(PICTURES[0])], PROMPTS[0], decoder=spec, max_new_tokens=2, **options)


def test_the_models_own_generate_is_refused():
    vlm = vlm_of("llava")
    with (
        pytest.raises(IncompatibleDecodersError, match=r"opera.* leads a beam search of its own"),
        OPERA().applied(vlm, batch_of(vlm)),
    ):
        pass
