"""Every profiler against a slow computation of its own: whole attention matrices, hooks, float64, one row at a time."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from random import Random

import pytest
import torch

from tests.contracts.support import unlike, vlm_of
from tests.heads.asked import PICTURES, QUESTION, SHOWN, alone
from tests.tiny import TINY
from vlmfix.heads.measure import profile
from vlmfix.heads.moments import rank_correlation
from vlmfix.heads.profilers.ablation import Ablation
from vlmfix.heads.profilers.echo import Echo
from vlmfix.heads.profilers.influence import Influence
from vlmfix.heads.profilers.needle import ASKED, WORDS
from vlmfix.heads.profilers.non_sink import NonSink
from vlmfix.heads.profilers.patching import Patching
from vlmfix.heads.profilers.retrieval import Retrieval
from vlmfix.heads.profilers.sink_tokens import SinkTokens, label
from vlmfix.insight.captions import Labels, Word
from vlmfix.insight.sinks import sink_strength
from vlmfix.models.layout import Batch

CONTENT = ("7", "red")
DIMS, THRESHOLD, SHARE = (1, 2), 1.2, 0.6


@contextmanager
def eager(vlm):
    """The model's own slow attention, which gives its weights."""
    modules = [vlm.family.decoder(vlm.model), *vlm.family.attention_modules(vlm.model)]
    configs = {id(module.config): module.config for module in modules}.values()
    former = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, former, strict=True):
            config._attn_implementation = name


@torch.no_grad()
def watched(vlm, batch):
    """Attention (L, H, T, T) and the states that enter the layers (L, T, d) of one row, in float64."""
    states = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, kwargs: states.append(args[0][0]), with_kwargs=True)
        for layer in vlm.family.layers(vlm.model)
    ]
    try:
        with eager(vlm):
            output = vlm.model(**batch, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([weights[0] for weights in output.attentions]).double(), torch.stack(states)


@torch.no_grad()
def head_outputs(vlm, batch):
    """(L, H, D) inputs of the output projections at the last position of one row."""
    found = []
    heads = vlm.model.config.get_text_config().num_attention_heads
    hooks = [
        module.o_proj.register_forward_pre_hook(lambda m, args: found.append(args[0][0, -1].view(heads, -1)))
        for module in vlm.family.attention_modules(vlm.model)
    ]
    try:
        vlm.model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).double()


def question_tokens(vlm, batch, words):
    """Columns of the bytes of some words of the question; every byte is a token."""
    ids = batch["input_ids"][0].tolist()
    letters = vlm.processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    start = max(i for i in range(len(ids)) if ids[i : i + len(letters)] == letters)
    return [start + QUESTION.index(word) + i for word in words for i in range(len(word))]


def image_mass(vlm, batch, layout):
    weights, _ = watched(vlm, batch)
    return weights[:, :, -1, layout.tokens[0]].sum(-1)


def gaze_shift(vlm, batch, layout):
    weights, _ = watched(vlm, batch)
    image, score = layout.tokens[0], 0
    for column in question_tokens(vlm, batch, CONTENT):
        score = score + (weights[:, :, column, image] - weights[:, :, column - 1, image]).clamp(min=0).sum(-1)
    return score


def non_sink(vlm, batch, layout):
    weights, states = watched(vlm, batch)
    image, rows = layout.tokens[0], layout.text_after_image()[0]
    score = torch.zeros(weights.shape[:2], dtype=torch.float64)
    for layer in range(2, len(weights)):
        sink = image & (sink_strength(states[layer], DIMS) > THRESHOLD)
        if not sink.any():
            continue
        total, spent = weights[layer][..., image].sum(-1), weights[layer][..., sink].sum(-1)  # (H, T)
        score[layer] = torch.where(spent / total <= SHARE, total, 0.0)[:, rows].mean(-1)
    return score


def divergence(vlm, batch, layout):
    kept = batch["input_ids"][0] != vlm.family.image_token(vlm.model.config)
    inputs = {"input_ids": batch["input_ids"][:, kept], "attention_mask": batch.attention_mask[:, kept]}
    inputs |= {name: batch[name][:, kept] for name in ("mm_token_type_ids", "token_type_ids") if name in batch}
    return (head_outputs(vlm, batch) - head_outputs(vlm, Batch(inputs))).norm(dim=-1)


@torch.no_grad()
def ablation(vlm, batch, layout):
    """One whole pass per head, with its slice of the last position's head outputs set to 0 by a hook."""
    modules = vlm.family.attention_modules(vlm.model)
    heads = vlm.model.config.get_text_config().num_attention_heads
    whole = vlm.model(**batch).logits[0, -1].double().softmax(-1)
    token = int(whole.argmax())
    score = torch.zeros(len(modules), heads, dtype=torch.float64)
    for layer, module in enumerate(modules):
        for head in range(heads):

            def silence(m, args, head=head):
                given = args[0].clone()
                given[:, -1].view(len(given), heads, -1)[:, head] = 0
                return (given,)

            hook = module.o_proj.register_forward_pre_hook(silence)
            score[layer, head] = whole[token] - vlm.model(**batch).logits[0, -1].double().softmax(-1)[token]
            hook.remove()
    return score


def saliency(vlm, batch, layout):
    with eager(vlm), torch.enable_grad():
        output = vlm.model(**batch, output_attentions=True)
        loss = -output.logits[0, -1].log_softmax(-1).max()
        slopes = torch.autograd.grad(loss, output.attentions)
    products = [(weights * slope).abs() for weights, slope in zip(output.attentions, slopes, strict=True)]
    return torch.stack([product[0, :, -1][:, layout.tokens[0]].sum(-1).double() for product in products])


@torch.no_grad()
def head_parts(vlm, batch):
    """(L, H, d) what each head adds to the residual stream at the last position, slice by slice of the projection."""
    outputs, parts = head_outputs(vlm, batch), []
    for layer, own in zip(vlm.family.layers(vlm.model), outputs, strict=True):
        weight, bias = layer.self_attn.o_proj.weight.double(), layer.self_attn.o_proj.bias
        width = own.shape[1]
        part = torch.stack([weight[:, h * width : (h + 1) * width] @ head for h, head in enumerate(own)])
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma: a norm with the gain 1 + w
            whole = part.sum(0) + (0 if bias is None else bias.double())
            part = part * (1 + layer.post_attention_layernorm.weight.double()) / (whole.square().mean() + 1e-6).sqrt()
        parts.append(part)
    return torch.stack(parts)


@torch.no_grad()
def logit_lens(vlm, batch, layout):
    found = []
    norm = vlm.family.decoder(vlm.model).norm
    hook = norm.register_forward_pre_hook(lambda module, args: found.append(args[0][0, -1].double()))
    token = int(vlm.model(**batch).logits[0, -1].argmax())
    hook.remove()
    words = vlm.model.get_output_embeddings().weight.double()
    gain = norm.weight.double() + ("gemma" in vlm.model.config.model_type)
    scale = gain / (found[0].square().mean() + 1e-6).sqrt()
    return (head_parts(vlm, batch) * scale) @ (words[token] - words.mean(0))


def heterogeneity(vlm, batch, layout):
    parts = head_parts(vlm, batch)
    lengths = (parts - parts.mean(1, keepdim=True)).norm(dim=-1)
    return lengths / parts.norm(dim=-1).mean(1, keepdim=True)


def active(vlm, batch, layout):
    """Attention of the last row times the lengths of values, by hooks on the value projections."""
    lengths = []
    width = vlm.family.attention_modules(vlm.model)[0].head_dim
    hooks = [
        module.v_proj.register_forward_hook(
            lambda module, args, given: lengths.append(given[0].double().unflatten(-1, (-1, width)).norm(dim=-1))
        )
        for module in vlm.family.attention_modules(vlm.model)
    ]
    weights, _ = watched(vlm, batch)
    for hook in hooks:
        hook.remove()
    rows = weights[:, :, -1, 1:]  # (L, H, T - 1)
    return torch.stack(
        [
            torch.stack([row @ own[1:, head * own.shape[1] // len(part)] for head, row in enumerate(part)])
            for part, own in zip(rows, lengths, strict=True)
        ]
    )


def distance(vlm, batch, layout):
    weights, _ = watched(vlm, batch)
    score, rows = 0, layout.text_after_image()[0].nonzero()[:, 0].tolist()
    for row in rows:
        for key in range(row + 1):
            score = score + weights[:, :, row, key] * min(row - key, 10)
    return score / len(rows)


REFERENCES = {
    "image-mass": ("image-mass", image_mass),
    "gaze-shift": ("gaze-shift", gaze_shift),
    "non-sink": (NonSink(sink_dims=DIMS, sink_threshold=THRESHOLD, largest_sink_share=SHARE), non_sink),
    "vhd": ("vhd", divergence),
    "ablation": (Ablation(copies=5), ablation),
    "saliency": ("saliency", saliency),
    "logit-lens": ("logit-lens", logit_lens),
    "heterogeneity": ("heterogeneity", heterogeneity),
    "active": ("active", active),
    "influence": ("influence", distance),
}


def test_influence_of_text_on_what_comes_later():
    vlm = vlm_of("llava")
    found = profile(vlm, PICTURES[:1], [Influence(near=3, far=6)], question=QUESTION)["influence"].details["future"]
    batch, layout = alone(vlm, PICTURES[0])
    weights, _ = watched(vlm, batch)
    rows = layout.text_after_image()[0].nonzero()[:, 0].tolist()
    means = []
    for key in rows:
        later = [weights[:, :, row, key] for row in rows if 3 <= row - key <= 6]
        means += [torch.stack(later).mean(0)] if later else []
    torch.testing.assert_close(found.double(), torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", TINY)
def test_a_padded_batch_scores_as_each_row_alone_does_by_a_slow_computation(family):
    vlm = vlm_of(family)
    found = profile(vlm, PICTURES, [profiler for profiler, _ in REFERENCES.values()], question=QUESTION)
    for name, (_, reference) in REFERENCES.items():
        expected = torch.stack([reference(vlm, *alone(vlm, shown)) for shown in PICTURES])
        torch.testing.assert_close(found[name].scores.double(), expected.mean(0), atol=2e-5, rtol=2e-4)
        assert expected.std() > 1e-6
        error = expected.std(0) / 2**0.5
        torch.testing.assert_close(found[name].stderr.double(), error, atol=2e-5, rtol=5e-3)


def first_characters(vlm, tokens):
    """For each token that writes a character of its own, where it begins; random bytes do not always."""
    tokenizer = vlm.processor.tokenizer
    texts = [tokenizer.decode(tokens[:count], skip_special_tokens=True) for count in range(len(tokens) + 1)]
    whole = [count for count, text in enumerate(texts) if texts[-1].startswith(text)]
    places = [count for count in whole if count + 1 in whole and len(texts[count + 1]) == len(texts[count]) + 1]
    return {place: len(texts[place]) for place in places}


@torch.no_grad()
def told(vlm, batch, count):
    """Greedy tokens of one row and the probabilities of every step, by whole passes."""
    tokens, steps = [], []
    for _ in range(count):
        steps.append(vlm.model(**answered(batch, tokens)).logits[0, -1].double().softmax(-1))
        tokens.append(int(steps[-1].argmax()))
        if tokens[-1] == vlm.model.generation_config.eos_token_id:
            break
    return tokens, steps


def answered(batch, tokens):
    """One row with the beginning of an answer behind it."""
    fresh = torch.tensor([tokens], dtype=torch.long)
    inputs = {"input_ids": torch.cat([batch["input_ids"], fresh], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in batch:
            inputs[name] = torch.cat([batch[name], torch.zeros_like(fresh)], dim=1)
    return batch.with_inputs(**inputs)


@torch.no_grad()
def losses(vlm, batch, tokens, place, whole):
    """(L, H) what a token loses without each head, in the row that chose it; in all rows for the first token."""
    heads = vlm.model.config.get_text_config().num_attention_heads
    inputs = answered(batch, tokens[:place])
    found = torch.zeros(len(vlm.family.layers(vlm.model)), heads, dtype=torch.float64)
    for layer, module in enumerate(vlm.family.attention_modules(vlm.model)):
        for head in range(heads):

            def silence(m, args, head=head):
                given = args[0].clone()
                rows = given if place == 0 else given[:, -1:]
                rows.view(*rows.shape[:2], heads, -1)[:, :, head] = 0
                return (given,)

            hook = module.o_proj.register_forward_pre_hook(silence)
            left = vlm.model(**inputs).logits[0, -1].double().softmax(-1)
            hook.remove()
            found[layer, head] = whole[tokens[place]] - left[tokens[place]]
    return found


@pytest.mark.parametrize("family", unlike())
def test_ablation_on_captions_by_whole_passes(family):
    vlm = vlm_of(family)
    kinds: dict[bool, list] = {True: [], False: []}
    labelled = []
    for shown in PICTURES:
        batch, _ = alone(vlm, shown)
        tokens, steps = told(vlm, batch, 8)
        starts = first_characters(vlm, tokens)
        words = {place: place % 3 == 1 for place in list(starts)[:3]}
        assert 0 in words or family == "qwen2_vl"  # which begins one with half a character
        labelled.append([Word(starts[place], starts[place] + 1, real) for place, real in words.items()])
        for place, real in words.items():
            kinds[real].append(losses(vlm, batch, tokens, place, steps[place]))
    real, hallucinated = torch.stack(kinds[True]).mean(0), torch.stack(kinds[False]).mean(0)
    labels = Labels(words=lambda number, caption: labelled[number], about={"by": "a test"})
    part = profile(vlm, PICTURES, [Ablation(copies=7, labels=labels, max_new_tokens=8)], question=QUESTION)["ablation"]
    torch.testing.assert_close(part.scores.double(), hallucinated - real, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(part.details["real"].double(), real, atol=2e-5, rtol=2e-4)
    counts = [part.details[name].tolist() for name in ("hallucinated_words", "real_words")]
    assert counts == [[len(kinds[False])], [len(kinds[True])]]
    agreed = rank_correlation(part.scores, part.details["first_order"])
    assert part.details["rank_correlation"] == pytest.approx(agreed, abs=1e-3)
    assert part.card.parameters == {
        "copies": 7,
        "max_new_tokens": 8,
        "target": "captions",
        "labels": {"by": "a test"},
    }


@contextmanager
def replaced(modules, values):
    """Inputs (``inputs``) or outputs of some modules at the last position, set to fixed ones."""

    def give(name, found):
        found = (found[0] if isinstance(found, tuple) else found).clone()
        found[:, -1] = values[name]
        return found

    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: (give(name, args),))
        if name[0] == "input"
        else module.register_forward_hook(lambda m, args, out, name=name: give(name, out))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def patched(vlm, batch, *, mlps):
    """Each head's two relative effects and the tokens, by a whole pass per head with everything else held by hooks."""
    layers = vlm.family.layers(vlm.model)
    kept = batch["input_ids"][0] != vlm.family.image_token(vlm.model.config)
    inputs = {"input_ids": batch["input_ids"][:, kept], "attention_mask": batch.attention_mask[:, kept]}
    inputs |= {name: batch[name][:, kept] for name in ("mm_token_type_ids", "token_type_ids") if name in batch}
    own, other = head_outputs(vlm, batch), head_outputs(vlm, Batch(inputs))
    memory = int(vlm.model(**inputs).logits[0, -1].argmax())
    values, hooks = {}, []
    for number, layer in enumerate(layers):
        values["input", number] = own[number].flatten().float()
        if mlps:
            keep = lambda m, args, out, number=number: values.update({("output", number): out[0, -1].clone()})  # noqa: E731
            hooks.append(layer.mlp.register_forward_hook(keep))
    whole = vlm.model(**batch).logits[0, -1].double().softmax(-1)
    for hook in hooks:
        hook.remove()
    modules = {
        (kind, number): layers[number].mlp if kind == "output" else layers[number].self_attn.o_proj
        for kind, number in values
    }
    tokens = [memory, int(whole.argmax())]
    found = torch.zeros(2, *own.shape[:2], dtype=torch.float64)
    for layer in range(own.shape[0]):
        for head in range(own.shape[1]):
            mixed = own[layer].clone()
            mixed[head] = other[layer, head]
            with replaced(modules, {**values, ("input", layer): mixed.flatten().float()}):
                left = vlm.model(**batch).logits[0, -1].double().softmax(-1)
            found[:, layer, head] = (whole[tokens] - left[tokens]) / whole[tokens]
    return found, tokens


@pytest.mark.parametrize("family", unlike())
def test_patching_by_whole_passes(family):
    vlm = vlm_of(family)
    exact, direct, agreed = [], [], 0
    for shown in SHOWN:
        batch, _ = alone(vlm, shown)
        found, (memory, context) = patched(vlm, batch, mlps=False)
        if memory == context:
            agreed += 1
            continue
        exact.append(found)
        direct.append(patched(vlm, batch, mlps=True)[0])
    assert exact, "no picture has a conflict"
    part = profile(vlm, SHOWN, [Patching(copies=5)], question=QUESTION)["patching"]
    assert part.card.pictures == len(exact)
    assert part.details["no_conflict"].tolist() == [agreed]
    mean, straight = torch.stack(exact).mean(0), torch.stack(direct).mean(0)
    for name, expected in (("memory", mean[0]), ("context", mean[1]), ("direct", straight[0] - straight[1])):
        torch.testing.assert_close(part.details[name].double(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(part.scores.double(), mean[0] - mean[1], atol=1e-4, rtol=1e-3)
    assert part.details["rank_correlation"] == pytest.approx(
        rank_correlation(mean[0] - mean[1], straight[0] - straight[1]), abs=0.02
    )
    assert (mean[0] - mean[1]).std() > 1e-3


def third_and_fifth(number, caption):
    return [Word(2, 3, False), Word(4, 5, True)]


@pytest.mark.parametrize("labels", [None, Labels(words=third_and_fifth, about={})], ids=["next-token", "captions"])
def test_first_order_is_exact_where_the_rest_is_linear(labels):
    """With tiny head outputs everything behind them is linear in them."""
    vlm = vlm_of("llava")
    modules = vlm.family.attention_modules(vlm.model)
    former = [module.o_proj.weight.clone() for module in modules]
    try:
        with torch.no_grad():
            for module in modules:
                module.o_proj.weight.mul_(3e-3)
        found = profile(vlm, PICTURES, [Ablation(labels=labels, max_new_tokens=8)])["ablation"]
    finally:
        with torch.no_grad():
            for module, weight in zip(modules, former, strict=True):
                module.o_proj.weight.copy_(weight)
    assert found.details["rank_correlation"] > 0.995
    scale = found.scores.abs().max()
    torch.testing.assert_close(found.details["first_order"], found.scores, atol=0.06 * float(scale), rtol=0.0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm"])
def test_retrieval_and_echo_by_the_whole_attention_matrix(family):
    vlm = vlm_of(family)
    scores, again, after = [], [], []
    for number, shown in enumerate(PICTURES):
        needle = " ".join(Random(f"5, {number}").sample(WORDS, 3))
        batch = vlm.encode([ASKED.format(needle=needle, question=QUESTION)], [[shown]])
        ids = batch["input_ids"][0].tolist()
        letters = vlm.processor.tokenizer(needle, add_special_tokens=False)["input_ids"]
        start = max(i for i in range(len(ids)) if ids[i : i + len(letters)] == letters)
        every = torch.tensor([ids + letters])
        inputs = {"input_ids": every, "attention_mask": torch.ones_like(every)}
        if "mm_token_type_ids" in batch:
            kinds = batch["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(letters))], dim=1)
        weights, _ = watched(vlm, batch.with_inputs(**inputs))
        hits = torch.zeros(weights.shape[:2])
        for step, token in enumerate(letters):
            peaks = weights[:, :, len(ids) - 1 + step].argmax(-1)  # (L, H)
            for place in range(start, start + len(letters)):
                hits += (peaks == place) & (ids[place] == token)
        scores.append(hits / len(letters))
        places = range(len(letters))
        again.append(sum(weights[:, :, len(ids) + step, start + step] for step in places) / len(letters))
        after.append(sum(weights[:, :, len(ids) + step, start + step + 1] for step in places[:-1]) / (len(letters) - 1))
    both = profile(vlm, PICTURES, [Retrieval(words=3), Echo(words=3)], question=QUESTION, seed=5)
    found = both["retrieval"]
    torch.testing.assert_close(found.scores, torch.stack(scores).mean(0))
    assert found.scores.max() > 0
    for name, expected in (("echo", again), ("induction", after)):
        torch.testing.assert_close(
            both["echo"].details[name].double(), torch.stack(expected).mean(0), atol=1e-6, rtol=1e-4
        )
    whole = torch.stack(again) + torch.stack(after)
    torch.testing.assert_close(both["echo"].scores.double(), whole.mean(0), atol=1e-6, rtol=1e-4)


def keep(kept, layer, args, output):
    kept.append(output)


@pytest.mark.parametrize("family", ["llava_next", "gemma3"])
def test_sinks_by_the_whole_attention_matrix(family):
    vlm = vlm_of(family)
    scores, cosine = [], 0.3
    for shown in PICTURES:
        batch, layout = alone(vlm, shown)
        weights, states = watched(vlm, batch)
        left = []
        hook = vlm.family.layers(vlm.model)[-1].register_forward_hook(partial(keep, left))
        with torch.no_grad():
            vlm.model(**batch)
        hook.remove()
        last = left[0] if isinstance(left[0], torch.Tensor) else left[0][0]
        states = torch.cat([states[1:], last]).double()  # (L, T, d), leaving each layer
        norms = states.norm(dim=-1)
        cosines = torch.stack(
            [torch.cosine_similarity(states, states[:, place : place + 1], dim=-1) for place in range(3)], dim=1
        )
        sinks = label(norms, cosines, cosine).tokens()
        assert sinks.sum() > 1
        scores.append(weights[:, :, layout.text_after_image()[0]][..., sinks].sum(-1).mean(-1))
    found = profile(vlm, PICTURES, [SinkTokens(cosine=cosine)], question=QUESTION)["sinks"]
    torch.testing.assert_close(found.scores.double(), torch.stack(scores).mean(0), atol=1e-5, rtol=1e-4)
