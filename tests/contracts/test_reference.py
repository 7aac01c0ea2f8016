"""Attention methods against a slow version of their own, on a whole model of every family.

The slow version knows nothing of edits, plans, caches or row numbers: it computes every row of attention in float64,
applies the specification to one row at a time, and runs the full sequence anew for every token.
"""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager

import pytest
import torch

from tests.contracts.support import PROMPTS, Forced, batch_of, close, crossed, logits, vlm_of
from vlmfix.decoders import ACT, ADHH, SPIN, VAR, Amplify, LocoRE, ZeroTuning
from vlmfix.decoders.attention.gift import GIFT
from vlmfix.decoders.attention.vhr import VHR
from vlmfix.upstream.attention import register, switched, unregister
from vlmfix.upstream.names import hidden

NAME = "slow_reference"


class Slow:
    """Attention of one model, with a rule for single rows.

    Args:
        rule: f(layer, b, h, q, scores or weights) for both stages, see the methods below.
        hidden: Residual stream that enters each layer, filled by hooks.
        map: Scores (B, H, Q, K), and then weights, of the layer that a rule is applied to; for rules about whole maps.
    """

    def __init__(self, scores, weights):
        self.scores, self.weights, self.hidden = scores, weights, {}

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        rows, heads, length, _ = query.shape
        key, value = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        scores = query.double() @ key.transpose(2, 3) * scaling
        allowed = torch.ones(length, length, dtype=torch.bool).tril() if attention_mask is None else attention_mask
        self.allowed = allowed = allowed.expand(rows, 1, length, length)
        edited = self._each_row(self.scores, module.layer_idx, scores)
        weights = edited.masked_fill(~allowed, -1e300).softmax(-1) * allowed
        final = self.together(module.layer_idx, self._each_row(self.weights, module.layer_idx, weights))
        output = self.outputs(module.layer_idx, (final @ value).transpose(1, 2))
        return output.to(query.dtype).contiguous(), None

    def _each_row(self, rule, layer, values):
        self.map = values
        if rule is same:
            return values
        new = values.clone()
        for b, h, q in itertools.product(*map(range, values.shape[:3])):
            row = values[b, h, q]
            changed = rule(layer, b, h, q, row)
            if changed is not row:
                new[b, h, q] = changed
        return new

    def together(self, layer, weights):
        """A rule for the weights (B, H, Q, K) of all heads, where a row of its own does not suffice."""
        return weights

    def outputs(self, layer, outputs):
        """A rule for the head outputs (B, Q, H, D)."""
        return outputs


@contextmanager
def installed(vlm, slow):
    register(NAME, slow)
    hooks = []
    for number, layer in enumerate(vlm.family.layers(vlm.model)):

        def keep(module, args, kwargs, number=number):
            slow.hidden[number] = hidden(args, kwargs)

        hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    owners = [vlm.family.decoder(vlm.model), *vlm.family.attention_modules(vlm.model)]
    try:
        with switched(owners, NAME):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        unregister(NAME)


def same(layer, b, h, q, row):
    return row


def var(vlm, batch, method):
    """Section 2.2 to 2.5 of VAR's specification."""
    layout = vlm.layout(batch)
    image, text, prompt = layout.tokens, layout.text, batch.length
    slow = Slow(same, None)

    def weights(layer, b, h, q, row):
        if layer < 2 or (q < prompt and not (bool(text[b, q]) and bool(image[b, : q + 1].any()))):
            return row
        x = slow.hidden[layer][b, :prompt].double()
        phi = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())[:, list(method.sink_dims)].abs().amax(-1)
        sink = torch.zeros(len(row), dtype=torch.bool)
        sink[:prompt] = phi > method.sink_threshold
        shown = torch.zeros(len(row), dtype=torch.bool)
        shown[:prompt] = image[b]
        seen, kept = row[shown].sum(), row[shown & ~sink].sum()
        if not (shown & sink).any() or seen < method.min_visual_mass or kept == 0:
            return row
        if kept / seen < method.min_nonsink_ratio:
            return row
        freed = method.moved_fraction * row[sink].sum()
        new = row.clone()
        new[sink] *= 1 - method.moved_fraction
        new[shown & ~sink] += freed * row[shown & ~sink] / kept
        return new

    slow.weights = weights
    return slow


def locore(vlm, batch, method):
    """Section 2.2 of LocoRE's specification."""
    layout, prompt = vlm.layout(batch), batch.length

    def window(b, q):
        start = int(layout.tokens[b].nonzero()[-1]) + 1 if method.scope == "post_image" else prompt
        return slice(max(start, q - method.window), max(q, start, 0))

    def boosted(stage):
        def rule(layer, b, h, q, row):
            if q < prompt - 1:
                return row
            new = row.clone()
            here = window(b, q)
            if method.mode == "renorm" and stage == "scores":
                new[here] += torch.log(torch.tensor(1 + method.strength, dtype=torch.float64))
            elif method.mode == "score" and stage == "scores":
                new[here] *= 1 + method.strength
            elif method.mode == "post" and stage == "weights":
                new[here] *= 1 + method.strength
            return new

        return rule

    return Slow(boosted("scores"), boosted("weights"))


def vhr(vlm, batch, method):
    """Sections 2.2 to 2.6 of VHR's specification: all heads are chosen layer by layer before the answer is computed."""
    image, prompt = vlm.layout(batch).tokens, batch.length
    layers = [layer for layer in range(3) if layer in method.layers.resolve(3)]
    slow, heads, last = Slow(same, same), {}, {}

    def outputs(layer, out):
        last[layer] = out[:, prompt - 1 if out.shape[1] >= prompt else -1]  # (B, H, D)
        if layer not in heads or (out.shape[0] == 1 and not method.reinforce_text_branch):
            return out
        rows = heads[layer] if out.shape[0] > 1 else heads[layer][slow.row : slow.row + 1]
        return torch.where(rows[:, None, :, None], out * method.alpha, out)

    def without_picture(row):
        ids = batch["input_ids"][row][batch.attention_mask[row].bool() & ~deleted[row]]
        types = {name: torch.zeros_like(ids)[None] for name in ("mm_token_type_ids", "token_type_ids") if name in batch}
        slow.row = row
        vlm.model(input_ids=ids[None], **types, use_cache=False)
        return dict(last)

    def choose(shown, blind):
        moved = [float(((a - b) ** 2).sum()) for a, b in zip(shown, blind, strict=True)]
        if method.distance == "euclidean":
            distance = [value**0.5 for value in moved]
        else:
            distance = list(moved)
        flares = [float((b**2).sum()) for b in blind]

        def bound(values):
            values = torch.tensor(values, dtype=torch.float64)
            return float(values.mean() + values.std())

        if method.drop_outliers and float(torch.tensor(moved, dtype=torch.float64).std()) > method.outlier_guard:
            high = bound(distance), bound(flares)
            out = [d > high[0] and f > high[1] for d, f in zip(distance, flares, strict=True)]
            distance = [0.0 if gone else d for d, gone in zip(distance, out, strict=True)]
        middle = sorted(distance)[(len(distance) - 1) // 2]
        return torch.tensor([d > middle for d in distance])

    slow.outputs, slow.row = outputs, 0
    deleted = batch["input_ids"] == vlm.family.image_token(vlm.model.config)
    with torch.no_grad(), installed(vlm, slow):
        for layer in layers:
            vlm.model(**batch, use_cache=False)
            shown = last[layer]
            heads[layer] = torch.stack(
                [choose(shown[row], without_picture(row)[layer][0]) & image[row].any() for row in range(batch.rows)]
            )
    return slow


def gift(vlm, batch, method):
    """Sections 2.1 to 2.3 of GIFT's specification; the tokens of question and content words are given."""
    image, prompt = vlm.layout(batch).tokens, batch.length
    source, target = method.saliency_layers.resolve(3), method.layers.resolve(3)
    question, content = tokens_of_questions(vlm, batch)
    slow, maps = Slow(same, same), {}

    def largest(values, share):
        order = sorted(range(len(values)), key=lambda head: (-values[head], head))
        return order[: int(share * len(values))]

    def learn(layer, weights):
        heads = weights.shape[1]
        for b in range(batch.rows):
            shift = torch.zeros(heads, len(content[b]), int(image[b].sum()), dtype=torch.float64)
            for place, column in enumerate(content[b]):
                now, before = (weights[b, :, i, :prompt][:, image[b]] for i in (column, column - 1))
                shift[:, place] = (now - before).clamp(min=0)
            kept = largest(shift.sum(dim=(1, 2)).tolist(), method.saliency_heads)
            maps.setdefault(layer, {})[b] = shift[kept].mean(dim=(0, 1))

    def gain(b):
        s = torch.stack([found[b] for found in maps.values()]).mean(dim=0)
        s = s.clamp(s.mean() - method.clip * s.std(), s.mean() + method.clip * s.std())
        return ((s - s.min()) / (s.max() - s.min()) * method.alpha).exp()

    def raised(weights, b, q):
        new = weights[b, :, q].clone()  # (H, K)
        shown = image[b].nonzero().flatten().tolist()
        looking = largest(new[:, shown].sum(-1).tolist(), method.image_heads)
        asking = largest(new[:, question[b]].sum(-1).tolist(), method.question_heads)
        before = sum(float(new[h, shown].sum()) for h in looking)
        for h in looking:
            new[h, shown] *= gain(b)
        after = sum(float(new[h, shown].sum()) for h in looking)
        for h in asking:
            new[h, question[b]] *= method.beta * after / before
        return new / new.sum(-1, keepdim=True)

    def together(layer, weights):
        if not slow.enhancing:
            if layer in source:
                learn(layer, weights)
            return weights
        if layer not in target:
            return weights
        new = weights.clone()
        for b in range(batch.rows):
            for q in range(prompt - 1, weights.shape[2]):
                new[b, :, q] = raised(weights, b, q)
        return new

    slow.together, slow.enhancing = together, False
    with torch.no_grad(), installed(vlm, slow):
        vlm.model(**batch, use_cache=False)
    slow.enhancing = True
    return slow


def tokens_of_questions(vlm, batch):
    """Columns of each row's question, and of its words that say something, in a tokenizer of one token per letter."""
    letters = [vlm.processor.tokenizer.decode([token]) for token in range(len(vlm.processor.tokenizer))]
    found = []
    for row, (asked, said) in enumerate(zip(PROMPTS, SAID, strict=True)):
        text = [letters[token] for token in batch["input_ids"][row].tolist()]
        start = max(i for i in range(len(text)) if "".join(text[i : i + len(asked)]) == asked)
        places = [asked.index(f" {word}") + 1 + i for word in said for i in range(len(word))]
        places = places or range(len(asked))
        found.append((list(range(start, start + len(asked))), [start + place for place in sorted(places)]))
    return [row[0] for row in found], [row[1] for row in found]


SAID: tuple[tuple[str, ...], ...] = ((), ("dog", "one", "two", "pictures"))
"""Content words of ``PROMPTS``."""


def acting(vlm, batch, method):
    """Whether row q of sample b is one that a method acts on: every one, or text behind a picture and what follows."""
    layout = vlm.layout(batch)

    @functools.cache
    def acts(b, q):
        if q >= batch.length:
            return True
        if method.rows == "prompt":
            return bool(batch.attention_mask[b, q])
        return bool(layout.text[b, q]) and bool(layout.tokens[b, :q].any())

    return acts


def zerotuning(vlm, batch, method):
    """Section C2 of the sinks' specification, in the form that scales weights."""
    first, acts = (batch.attention_mask == 1).int().argmax(-1).tolist(), acting(vlm, batch, method)

    def weights(layer, b, h, q, row):
        heads = range(8) if method.heads is None else method.heads
        if h not in heads or layer not in method.layers.resolve(3) or q == first[b] or not acts(b, q):
            return row
        new = row.clone()
        new[first[b]] *= method.gain
        return new / new.sum()

    return Slow(same, weights)


def act(vlm, batch, method):
    """Section B2 of the sinks' specification."""
    first, prompt = (batch.attention_mask == 1).int().argmax(-1).tolist(), batch.length
    slow, acts, heads = Slow(same, None), acting(vlm, batch, method), method._chosen(vlm)

    def sinks(b, h):
        start, found = first[b], []
        theta = method.sink_factor / (prompt - start) if method.sink_threshold is None else method.sink_threshold
        rows = [i for i in range(prompt) if acts(b, i)]
        looks, sees = slow.map[b, h, rows].T.tolist(), slow.allowed[b, 0, rows].T.tolist()
        for j in range(start, prompt - method.spared_tail):
            column = [look for look, seen in zip(looks[j], sees[j], strict=True) if seen]
            if column and sum(column) / len(column) > theta:
                found.append(j)
        return found[1:] if method.spared == "first-sink" else [j for j in found if j != start]

    def weights(layer, b, h, q, row):
        if (layer, h) not in heads or not acts(b, q):
            return row
        if slow.memory.get("of") is not slow.map:
            slow.memory = {"of": slow.map}
        if (b, h) not in slow.memory:
            slow.memory[b, h] = sinks(b, h)
        chosen = slow.memory[b, h]
        clear, new = row.clone(), row.clone()
        clear[chosen] = 0
        new[chosen] *= method.kept_fraction
        return new + (1 - method.kept_fraction) * row[chosen].sum() * clear / clear.sum()

    slow.weights, slow.memory = weights, {}
    return slow


def spin(vlm, batch, method):
    """Section 3.4 of the head profilers' specification."""
    own, image, prompt = method.settings(vlm), vlm.layout(batch).tokens, batch.length
    slow, looks = Slow(None, None), {}

    def scores(layer, b, h, q, row):
        looks["scores"] = slow.map
        return row

    def weights(layer, b, h, q, row):
        if q < prompt - 1 or layer not in own.layers.resolve(3):
            return row
        shown = image[b].nonzero().flatten().tolist()
        source = looks["scores"] if method.preset == "official-code" else slow.map
        mass = [float(source[b, other, q, shown].sum()) for other in range(8)]
        kept = sorted(range(8), key=lambda other: -mass[other])[: int(own.kept_share * 8)]
        return row if h in kept else own.suppression * row

    slow.scores, slow.weights = scores, weights
    return slow


def adhh(vlm, batch, method):
    """Section 3.10 of the head profilers' specification, with the text behind the last of several pictures."""
    layout, prompt = vlm.layout(batch), batch.length
    pictures = [max(layout.tokens[b].nonzero().flatten().tolist()) for b in range(batch.rows)]

    def weights(layer, b, h, q, row):
        if q < prompt - 1 or (layer, h) not in method.heads.pairs:
            return row
        behind = [j for j in range(pictures[b] + 1, q + 1) if j >= prompt or bool(layout.text[b, j])]
        new = row.clone()
        if sum(float(row[j]) for j in behind) >= method.threshold:
            new[behind] = 0
        return new

    return Slow(same, weights)


def amplify(vlm, batch, method):
    """Attention of the named heads mixed with looking at oneself in text rows, and their outputs times a factor."""
    layout, prompt = vlm.layout(batch), batch.length
    text = layout.text_after_image()

    def weights(layer, b, h, q, row):
        if (layer, h) not in method.heads.pairs or (q < prompt and not bool(text[b, q])):
            return row
        new = (1 - method.identity) * row
        new[q] += method.identity
        return new

    slow = Slow(same, weights)

    def outputs(layer, found):
        found = found.clone()
        for own, head in method.heads.pairs:
            if own == layer:
                found[:, :, head] *= method.by
        return found

    slow.outputs = outputs
    return slow


METHODS = {
    "var": (
        var,
        VAR(sink_dims=(1, 2, 3, 4), sink_threshold=0.9, min_visual_mass=0.1, min_nonsink_ratio=0.3, layers="2:"),
    ),
    "var-official": (
        var,
        VAR(preset="official-code", sink_dims=(5, 9, 11), sink_threshold=1.2, min_visual_mass=0.05),
    ),
    "vhr": (vhr, VHR(alpha=2.5, layers="all")),
    "vhr-official": (vhr, VHR(alpha=1.7, layers="1:", preset="official-code", outlier_guard=0.01)),
    "vhr-both": (vhr, VHR(alpha=0.3, layers="0/2", reinforce_text_branch=True)),
    "gift": (gift, GIFT(alpha=3.0, saliency_layers="0", layers="1:", words="stop-words")),
    "gift-apart": (
        gift,
        GIFT(
            alpha=2.0,
            beta=1.5,
            saliency_layers="0/2",
            layers="0:2",
            clip=0.7,
            saliency_heads=0.8,
            image_heads=0.3,
            question_heads=0.7,
            words="stop-words",
        ),
    ),
    "locore": (locore, LocoRE(strength=1.5, window=3)),
    "locore-generated": (locore, LocoRE(strength=1.5, preset="semantic", window=2)),
    "locore-post": (locore, LocoRE(strength=1.5, mode="post")),
    "locore-score": (locore, LocoRE(strength=1.5, mode="score")),
    "zerotuning": (zerotuning, ZeroTuning(gain=3.0)),
    "zerotuning-heads": (zerotuning, ZeroTuning(gain=0.0, heads=(0, 5, 6), layers="1:")),
    "zerotuning-text": (zerotuning, ZeroTuning(gain=3.0, rows="text")),
    "act": (act, ACT(sink_factor=1.5, heads="L0H1/L0H2/L1H0/L1H7/L2H4/L2H5", layers="all")),
    "act-official": (act, ACT(preset="official-code", sink_threshold=0.02, heads="all", layers="1:")),
    "act-text": (act, ACT(sink_factor=1.5, heads="all", layers="all", rows="text")),
    "spin": (spin, SPIN(kept_share=0.7, suppression=0.1)),
    "adhh": (adhh, ADHH(heads="L0H2/L0H3/L1H0/L1H1/L1H6/L2H4/L2H5/L2H7", threshold=0.45)),
    "amplify": (amplify, Amplify(heads="L0H2/L1H0/L1H6/L2H5", by=1.6, identity=0.4)),
    "spin-official": (spin, SPIN(preset="official-code", kept_share=0.4, layers="1:")),
}
TOKENS = torch.tensor([[40, 50, 60], [70, 45, 33]])


@pytest.mark.parametrize(("family", "name"), crossed({name: method for name, (_, method) in METHODS.items()}, turn=0))
def test_a_whole_model_with_the_slow_method_gives_the_same_logits(family, name):
    build, method = METHODS[name]
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    fast = logits(vlm, batch, method, logits_processor=[Forced(TOKENS, batch.length)])
    with installed(vlm, build(vlm, batch, method)):
        slow = logits(vlm, batch, logits_processor=[Forced(TOKENS, batch.length)], use_cache=False)
    close(fast, slow, 1e-4)
    plain = logits(vlm, batch, logits_processor=[Forced(TOKENS, batch.length)])
    assert (fast - plain).abs().max() > 1e-4
