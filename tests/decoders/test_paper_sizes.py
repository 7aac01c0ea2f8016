"""Rules of the published methods at the sizes of their papers' models, against float64 written down from the formulas.

The models are LLaVA-1.5's: 32 layers, 32 heads of 128 dimensions, 576 tokens of a picture behind 35 of text, and a
vocabulary of 32,000. Whole models of that size are not needed to see a rule err in a rank, a threshold or float32.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch import nn

from tests.decoders.attention.test_locore import site
from vlmfix.attention.edit import Column
from vlmfix.decoders import OPERA
from vlmfix.decoders.attention.acg import Guided
from vlmfix.decoders.attention.vaf import Amplified
from vlmfix.decoders.choice import opera
from vlmfix.decoders.logits.avisc import blind
from vlmfix.decoders.logits.deco import Correction
from vlmfix.decoders.logits.dola import LayerContrast
from vlmfix.decoders.logits.flb import Boost
from vlmfix.decoders.logits.m3id import GrowingContrast
from vlmfix.decoders.logits.mixture import Mixture
from vlmfix.decoders.logits.mod import most_regarded
from vlmfix.decoders.logits.only import TextHeads
from vlmfix.decoders.logits.revisit import Product
from vlmfix.decoders.logits.sid import most_seen
from vlmfix.decoders.states.kvsmooth import Smoothed
from vlmfix.decoders.states.memvr import Retraced
from vlmfix.decoding.beams import Stand

LAYERS, HEADS, WIDTH, BEFORE, SHOWN, SAID, WORDS = 32, 32, 128, 35, 576, 60, 32000
KEYS = BEFORE + SHOWN + SAID
ROWS = torch.ones(3, dtype=torch.bool)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, generator=dice(seed))


def looks(*shape, scale=3.0, seed=0):
    """Attention that is as uneven as a model's, with a sink at the first key."""
    scores = drawn(*shape, scale=scale, seed=seed)
    scores[..., 0] += 4
    return scores.softmax(dim=-1)


def here(prompt=BEFORE + SHOWN + 20):
    image = range(BEFORE, BEFORE + SHOWN)
    return site([KEYS - 1], keys=KEYS, prompt=prompt, image=image, text=[k for k in range(prompt) if k not in image])


def near(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def probabilities(logits):
    exact = logits.double()
    parts = (exact - exact.max()).exp()
    return parts / parts.sum()


def cut(clean, scores, share):
    """Keeps tokens of at least so large a share of the largest probability."""
    chances = probabilities(clean)
    return torch.where(chances >= share * chances.max(), scores, -math.inf)


def centred(scores):
    """Scores that softmax takes for the same, whatever was added to all of them."""
    exact = scores.double()
    return exact - exact.max()


def test_sid_hides_all_but_the_hundred_least_regarded_of_576():
    seen = looks(2, KEYS)
    image = torch.zeros(2, KEYS, dtype=torch.bool)
    image[:, BEFORE : BEFORE + SHOWN] = True
    hidden = most_seen(seen, image, 100 / 576)
    for row in range(2):
        least = sorted(range(BEFORE, BEFORE + SHOWN), key=lambda key, row=row: float(seen[row, key]))[:100]
        assert set((image[row] & ~hidden[row]).nonzero().flatten().tolist()) == set(least)


@pytest.mark.parametrize(("share", "deviations"), [(0.5, 1.0), (0.5, 0.99), (0.9, 0.0)])
def test_avisc_finds_blind_tokens_in_as_few_layers_as_give_the_share(share, deviations):
    seen = looks(LAYERS, KEYS)[:, BEFORE : BEFORE + SHOWN].double() * torch.rand(LAYERS, 1, generator=dice(1)).double()
    sums = [math.fsum(layer) for layer in seen.tolist()]
    chosen, total = [], 0.0
    for layer in sorted(range(LAYERS), key=lambda one: -sums[one]):
        chosen.append(layer)
        total += sums[layer] / math.fsum(sums)
        if total >= share:
            break
    assert 1 < len(chosen) < LAYERS
    mean = [math.fsum(float(seen[layer, key]) for layer in chosen) / len(chosen) for key in range(SHOWN)]
    middle = math.fsum(mean) / SHOWN
    spread = math.sqrt(math.fsum((one - middle) ** 2 for one in mean) / (SHOWN - 1))
    assert blind(seen.float(), share, deviations).tolist() == [one >= middle + deviations * spread for one in mean]


def divergence(one, other):
    middle = (one + other) / 2
    return float(sum((x * (x.clamp(min=1e-300) / middle).log()).sum() for x in (one, other)) / 2)


def released_distance(one, other):
    middle = (one + other) / 2
    return float(sum((middle * (middle / x).log()).mean() for x in (one, other)) / 2)


@pytest.mark.parametrize(("swapped", "measure"), [(False, divergence), (True, released_distance)])
def test_dola_takes_each_rows_own_furthest_layer(swapped, measure):
    clean = drawn(3, WORDS, scale=3.0)
    early = torch.stack([clean * (1 - layer / 9) + drawn(3, WORDS, scale=layer / 2, seed=layer) for layer in range(8)])
    early[:, 1] = early[torch.arange(8).flip(0), 1]
    rule = LayerContrast(branches=(), rows=ROWS, plausibility=0.1, swapped=swapped)
    found, chosen = rule.fuse(clean, early, clean), []
    for row in range(3):
        last = probabilities(clean[row])
        far = [measure(last, probabilities(early[layer, row])) for layer in range(8)]
        chosen.append(max(range(8), key=far.__getitem__))
        expected = cut(clean[row], last.log() - probabilities(early[chosen[-1], row]).log(), 0.1)
        near(centred(found[row]), centred(expected), 1e-4)
    assert len(set(chosen)) > 1


def test_deco_adds_each_rows_own_surest_layer():
    clean = drawn(3, WORDS, scale=3.5)
    clean[1, 7] = clean[1].max() + 9  # one candidate
    early = torch.stack([clean.roll(layer % 3, 0) / 2 + drawn(3, WORDS, scale=3, seed=layer) for layer in range(9)])
    rule = Correction(branches=(), rows=ROWS, strength=0.6, nucleus=0.9, most=20)
    found, chosen = rule.fuse(clean, early, clean), []
    for row in range(3):
        chances, kept, total = probabilities(clean[row]), [], 0.0
        for token in sorted(range(WORDS), key=lambda one, chances=chances: -float(chances[one]))[:20]:
            kept.append(token)
            total += float(chances[token])
            if total >= 0.9:
                break
        sure = {(layer, token): float(probabilities(early[layer, row])[token]) for layer in range(9) for token in kept}
        layer, _ = best = max(sure, key=sure.__getitem__)
        expected = torch.full((WORDS,), -math.inf, dtype=torch.float64)
        expected[kept] = (clean[row].double() + 0.6 * sure[best] * early[layer, row].double())[kept]
        near(found[row], expected, 1e-4)
        chosen.append((layer, len(kept)))
    assert chosen[1][1] == 1 < chosen[0][1]


@pytest.mark.parametrize(("first", "limit"), [(1, math.inf), (0, math.inf), (1, 3.0)])
def test_m3id_forgets_the_text_by_two_percent_a_token(first, limit):
    rule = GrowingContrast(
        branches=(), rows=ROWS, decay=0.02, plausibility=0.1, confidence=1, max_weight=limit, first_step=first
    )
    clean, text = drawn(2, 3, WORDS, scale=3.0)
    for step in range(first, first + 512):
        found = rule.fuse(clean[:, :50], text[None, :, :50], clean[:, :50])
        if step not in (0, 1, 2, 50, 100, 500):
            continue
        kept = 1.0
        for _ in range(step):  # gamma falls by the same factor at each token
            kept *= math.exp(-0.02)
        weight = min((1 - kept) / kept, limit)
        for row in range(3):
            c, u = (probabilities(x[row, :50]).log() for x in (clean, text))
            near(centred(found[row]), centred(cut(clean[row, :50], c + weight * (c - u), 0.1)), 1e-4)


def test_flb_adds_the_first_logits_with_a_weight_that_saturates():
    rule = Boost(branches=(), rows=ROWS, strength=0.3, decay=0.05, plausibility=0.1)
    first = drawn(3, WORDS, scale=3.0)
    for step in range(200):
        now = first if step == 0 else drawn(3, WORDS, scale=3.0, seed=step) if step in (1, 7, 199) else first
        found = rule.fuse(now, now[None, :0], now)
        weight = 0.3 * (1 - math.exp(-0.05 * step))
        if step in (0, 1, 7, 199):
            for row in range(3):
                near(found[row], cut(now[row], now[row].double() + weight * first[row].double(), 0.1), 1e-4)
    assert weight == pytest.approx(0.3, rel=1e-3)


def test_mod_decides_once_by_nats_over_the_whole_vocabulary():
    clean = drawn(3, WORDS, scale=3.0)
    for noise in (0.5, 0.75, 1.0):
        other = clean + noise * drawn(3, WORDS, seed=5)
        rule = Mixture(branches=(), rows=ROWS, agreement=0.05, complement=4.0, contrast=1.0, plausibility=0.5)
        found = rule.fuse(clean, other[None], clean)
        for row in range(3):
            agree = divergence(probabilities(clean[row]), probabilities(other[row])) < 0.05
            own, second = clean[row].double(), other[row].double()
            near(found[row], cut(clean[row], own + 4 * second if agree else 2 * own - second, 0.5), 1e-4)
    seen = looks(LAYERS, KEYS)[:, BEFORE : BEFORE + SHOWN]
    total = [math.fsum(seen[:, key].tolist()) for key in range(SHOWN)]
    blank = sorted(range(SHOWN), key=total.__getitem__)[: int(SHOWN * 0.8)]
    assert set((~most_regarded(seen.double().sum(dim=0), 0.2)).nonzero().flatten().tolist()) == set(blank)


def test_only_switches_off_heads_below_the_mean_ratio_of_entropies():
    weights = looks(HEADS, KEYS, scale=1.5) * torch.rand(HEADS, 1, generator=dice(2)).add(0.5)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    image = list(range(BEFORE, BEFORE + SHOWN))
    text = [key for key in range(1, KEYS) if key not in set(image)]
    ratios, out = [], torch.zeros(HEADS, KEYS, dtype=torch.bool)
    for head in range(HEADS):
        entropies = []
        for columns in (text, image):
            own = weights[head, columns].double()
            high = own > own.mean() + own.std(unbiased=True)
            out[head, torch.tensor(columns)[high]] = True
            share = own.masked_fill(high, 0) / own.masked_fill(high, 0).sum()
            entropies.append(float(-(share * (share + 1e-6).log()).sum()))
        ratios.append(entropies[0] / entropies[1])
    off = torch.tensor([ratio < math.fsum(ratios) / HEADS for ratio in ratios])
    assert 0 < int(off.sum()) < HEADS
    given = weights[None, :, None]
    near(TextHeads(trimmed=False).share(here(), given)[0, :, 0], weights.masked_fill(off[:, None], 0))
    near(TextHeads(trimmed=True).share(here(), given)[0, :, 0], weights.masked_fill(off[:, None] | out, 0))


@pytest.mark.parametrize("safe", [True, False])
def test_vaf_raises_the_picture_by_15_and_lowers_what_is_before_it_by_5_percent(safe):
    scores = drawn(1, HEADS, 1, KEYS, scale=2.0)
    found = Amplified(image=1.15, system=0.95, safe=safe).scores(here(), scores)[0, :, 0]
    for key in (0, BEFORE - 1, BEFORE, BEFORE + SHOWN - 1, BEFORE + SHOWN, KEYS - 1):
        factor = 0.95 if key < BEFORE else 1.15 if key < BEFORE + SHOWN else 1.0
        own = scores[0, :, 0, key].double()
        near(found[:, key], own + (factor - 1) * own.abs() if safe else factor * own)


@pytest.mark.parametrize("heads", [True, False])
def test_acg_adds_what_only_the_picture_changes(heads):
    scores, values = drawn(HEADS, KEYS, scale=3.0).double(), drawn(HEADS, KEYS, WIDTH, seed=1).double()
    image = here().image_keys[0]
    whole, without = (
        (s.softmax(dim=-1)[:, None] @ values)[:, 0] for s in (scores, scores.masked_fill(image, -math.inf))
    )
    effect = whole - without
    if heads:
        unit = without / without.norm(dim=-1, keepdim=True)
        effect = effect - (effect * unit).sum(dim=-1, keepdim=True) * unit
    else:
        unit = without / without.norm()
        effect = effect - (effect * unit).sum() * unit
    weights = scores.softmax(dim=-1).float()
    own = weights * image
    given = [x[None, :, None] for x in (weights, own)]
    outputs = [x @ values.float()[None] for x in given]
    edit = Guided(strength=2.4, orthogonal=True, heads=heads)
    found = edit.output(here(), *outputs, given[1].sum(dim=-1, keepdim=True))
    near(found[0, :, 0], whole + 2.4 * effect, 1e-4)


def test_kvsmooth_mixes_by_the_rank_of_the_last_fifteen_entropies():
    edit = Smoothed(low=0.7, high=1.0, window=15, heads=True)
    place = here()
    edit.begin(place)
    entropies, before = [], Column(*drawn(2, 1, 8, 1, WIDTH, seed=9))
    exact, shares = [part.double() for part in before], set()
    for step in range(40):
        weights = looks(1, HEADS, 1, KEYS, scale=1 + 2 * random.Random(step).random(), seed=step)
        newest = Column(*drawn(2, 1, 8, 1, WIDTH, seed=100 + step))
        rows = weights[0, :, 0].double()
        entropies.append(float(-(rows * rows.log()).sum(dim=-1).mean()))
        last = entropies[-15:]
        share = min(max(sum(one <= entropies[-1] for one in last) / len(last), 0.7), 1.0)
        shares.add(share)
        exact = [(1 - share) * new.double() + share * old for new, old in zip(newest, exact, strict=True)]
        before = edit.kept(place, weights, newest, before)
        for found, expected in zip(before, exact, strict=True):
            near(found, expected)
    assert len(shares) > 3


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


class Model(nn.Module):
    """A head of 32,000 words whose states are the logits."""

    config = type("Config", (), {"get_text_config": lambda self: self})()

    def get_output_embeddings(self):
        return nn.Identity()


class Headed(Model):
    """A model whose states have 64 dimensions."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, WORDS, bias=False)
        self.head.weight.data = drawn(WORDS, 64, scale=0.6, seed=4)

    def get_output_embeddings(self):
        return self.head


@torch.no_grad()
@pytest.mark.parametrize(("swapped", "measure"), [(False, divergence), (True, released_distance)])
def test_revisit_multiplies_with_the_picture_token_that_agrees_most(swapped, measure):
    model, states = Headed(), drawn(1, 3, BEFORE + SHOWN, 64)
    tokens = torch.zeros(3, BEFORE + SHOWN, dtype=torch.bool)
    tokens[:, BEFORE:] = True
    tokens[1, BEFORE : BEFORE + 100] = False
    rule = Product(branches=(), rows=ROWS, model=model, tokens=tokens, strength=1.0, plausibility=1e-5, swapped=swapped)
    rule.view(states)
    clean = model.head(states[0, :, BEFORE + 200]) + drawn(3, WORDS, seed=6)
    found = rule.fuse(clean, clean[None, :0], clean)
    for row in range(3):
        chances = probabilities(clean[row])
        kept = (chances >= 1e-5 * chances.max()).nonzero().flatten()
        own, said = probabilities(clean[row, kept]), model.head(states[0, row, tokens[row]])[:, kept]
        each = [probabilities(one) for one in said]
        nearest = min(range(len(each)), key=lambda one, own=own, each=each: measure(own, each[one]))
        expected = torch.full((WORDS,), -math.inf, dtype=torch.float64)
        expected[kept] = own.log() + each[nearest].log()
        assert 100 < len(kept) < WORDS
        near(centred(found[row]), centred(expected), 1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.9])
def test_memvr_asks_the_entropy_of_the_ten_best_over_its_largest(threshold):
    states = drawn(1, 200, WORDS) * torch.linspace(0.2, 20, 200)[:, None]
    edit = Retraced(first=1, ratio=0.12, threshold=threshold, model=Model(), decoder=Decoder())
    expected = []
    for logits in states[0].double():
        parts = sorted(logits.tolist(), reverse=True)[:10]
        sizes = [math.exp(part - parts[0]) for part in parts]
        shares = [size / sum(sizes) for size in sizes]
        expected.append(-sum(share * math.log(share) for share in shares) / math.log(10) > threshold)
    assert 10 < sum(expected) < 190
    assert edit._unsure(states)[0].tolist() == expected


@pytest.mark.parametrize("preset", ["paper", "official-code"])
def test_opera_scores_columns_by_products_over_three_hundred_tokens(preset):
    """Products of 300 factors: float32 and float16 lose most of them, and sums of logarithms none."""
    method, length = OPERA(preset=preset), 300
    course = opera.Retrospection(None, method, None)
    rows = looks(2, length, KEYS + length, scale=2.0)
    rows[0, 40:, KEYS + 20] += 0.018 / (1 - 0.018)  # attention piles up on one token
    rows = rows / rows.sum(dim=-1, keepdim=True)
    sums = torch.zeros(2, 0)
    for step in range(length):
        sums = course._longer(sums, rows[:, step, : KEYS + step + 1])
    penalties, places = course._penalty(sums, torch.zeros(2))
    for beam in range(2):
        square = rows[beam, :, KEYS:].double() * 50
        logs = torch.stack([square[c:, c].log().sum() for c in range(length)]) + math.log(1e-7)
        if preset == "paper":
            assert int(places[beam]) == int(logs.argmax())
            assert float(penalties[beam]) == pytest.approx(float(logs.max().clamp(max=math.log(1e30)).exp()), rel=1e-3)
        else:
            halves = logs.exp().to(torch.float16)
            assert float(penalties[beam]) == pytest.approx(float(halves.max()), rel=2e-3)
            assert float(halves[int(places[beam])]) == float(halves.max())


class Released:
    """The released search's bookkeeping: one list of states and one of notes, from whose ends it takes."""

    def __init__(self, threshold, candidates, window):
        self.threshold, self.candidates, self.window = threshold, candidates, window
        self.states, self.notes, self.times, self.rejected = [], [], Counter(), {}

    def step(self, said, chosen, notes):
        """Returns to how many tokens it goes back from ``said``; None to go on. ``chosen`` led to ``said``."""
        self.states.append((said, chosen))
        self.notes.append(notes)
        loc = min(Counter(notes).items(), key=lambda pair: (-pair[1], pair[0]))[0]
        if not all(sum(one[beam] == loc for one in self.notes) > self.threshold for beam in range(len(notes))):
            return None
        if loc < 10:
            return None
        position, length = loc + 1, said + 1
        if self.times[position] >= self.candidates:
            position -= 1
            if self.times[position] >= self.candidates:
                return None
        self.times[position] += 1
        if length - position > self.window + 1:
            position = max(1, length - self.window - 1)
        for _ in range(length - position - 2):
            self.states.pop()
            self.notes.pop()
        to, (_, led) = self.states[-2][0], self.states[-1]
        self.states.pop()
        self.notes.pop()
        self.rejected.pop(position + 1, None)
        self.rejected[position] = [*self.rejected.get(position, []), *led]
        return to


@pytest.mark.parametrize("seed", range(6))
def test_opera_goes_back_where_the_released_bookkeeping_does(seed):
    """Random notes of two beams, with rollbacks on rollbacks; a window of 30 tokens, two returns to a place."""
    draw = random.Random(seed)
    method = OPERA(preset="official-code", num_beams=2, threshold=3, candidates=2, window=30)
    other = Released(3, 2, 30)
    past, said, tokens, backs = opera.Past(torch.zeros(2, 0)), 0, itertools.count(), 0
    chosen = ()
    for _ in range(400):
        # a few columns are pointed at for a while, those that many tokens have stood behind
        notes = [draw.choice([min(place, said) for place in (5, 11, 12, said - 6)]) for _ in range(2)]
        notes = [max(note, 0) for note in (notes if draw.random() < 0.3 else [notes[0]] * 2)]
        past.stands.append((Stand(growing=(tuple(range(said)),) * 2, chosen=chosen), torch.zeros(2, said)))
        past.noted.append(notes)
        place, expected = past.place(method), other.step(said, chosen, notes)
        assert place == expected
        if place is not None:
            backs += 1
            past.take_back(place, forgets=False)
            assert [len(stand.growing[0]) for stand, _ in past.stands] == [state for state, _ in other.states]
            assert past.noted == other.notes
            assert {k: v for k, v in past.rejected.items() if v} == {k: list(v) for k, v in other.rejected.items() if v}
            said = place
        said += 1
        chosen = tuple((beam, next(tokens)) for beam in range(2))
    assert backs > 5
