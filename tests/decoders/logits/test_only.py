"""ONLY against the slow way of its formula: weights, heads and second logits in float64, one row and step at a time."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import batch_of, close, extended, logits, vlm_of
from tests.decoders.attention.test_locore import site
from vlmfix.decoders import ONLY
from vlmfix.decoders.logits.only import Adaptive, TextHeads, entropy, outlying
from vlmfix.upstream.attention import register, switched, unregister

STEPS = 3
LAYER = 1


@torch.no_grad()
def looked(vlm, inputs):
    """Weights (H, K) and values (K, H, D) of the newest row in the layer, and the output of the whole pass."""
    found = {}

    def plain(module, query, key, value, attention_mask, scaling, **kwargs):
        heads, length = query.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        allowed = torch.ones(length, length, dtype=torch.bool).tril() if attention_mask is None else attention_mask
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -1e30)
        weights = scores.softmax(-1)
        if module.layer_idx == LAYER:
            found["weights"], found["values"] = weights[0, :, -1].double(), value[0].transpose(0, 1).double()
        return (weights @ value).transpose(1, 2).contiguous(), None

    register("slow_only", plain)
    try:
        with switched([vlm.family.decoder(vlm.model), *vlm.family.attention_modules(vlm.model)], "slow_only"):
            output = vlm.model(**inputs, use_cache=False, output_hidden_states=True)
    finally:
        unregister("slow_only")
    return found["weights"], found["values"], output


def kept(values):
    values = torch.tensor(values, dtype=torch.float64)
    return (values <= values.mean() + values.std()).tolist()


def spread(values):
    shares = [value / sum(values) for value in values]
    return -sum(share * math.log(share + 1e-6) for share in shares)


def heads(weights, text, image):
    """Which heads stay, and which keys of each are outliers."""
    ratios, out = [], torch.zeros_like(weights, dtype=torch.bool)
    for head, row in enumerate(weights.tolist()):
        entropies = []
        for columns in (text, image):
            fine = kept([row[column] for column in columns])
            out[head, [column for column, good in zip(columns, fine, strict=True) if not good]] = True
            entropies.append(spread([row[column] for column, good in zip(columns, fine, strict=True) if good]))
        ratios.append(entropies[0] / entropies[1])
    return torch.tensor(ratios) >= sum(ratios) / len(ratios), out


@torch.no_grad()
def second(vlm, inputs, method, text, image):
    """The clean logits and the second ones, (V,) float64 each."""
    weights, values, output = looked(vlm, inputs)
    stay, out = heads(weights, text, image)
    assert 0 < int(stay.sum()) < len(stay)
    said = weights * stay[:, None]
    if method.path == "released":
        said = said.masked_fill(out, 0.0)
    mixed = torch.einsum("hk,khd->hd", said, values).flatten().float()
    layers, decoder = vlm.family.layers(vlm.model), vlm.family.decoder(vlm.model)
    added = vlm.family.attention_modules(vlm.model)[LAYER].o_proj(mixed)
    streams = [states[0, -1] for states in output.hidden_states]
    gemma = hasattr(layers[0], "pre_feedforward_layernorm")

    def rest(layer, stream):
        if gemma:
            return stream + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(stream)))
        return stream + layer.mlp(layer.post_attention_layernorm(stream))

    if method.path == "layer":
        layer = layers[LAYER]
        state = decoder.norm(rest(layer, streams[LAYER] + (layer.post_attention_layernorm(added) if gemma else added)))
    else:
        last = layers[-1]
        # transformers' last hidden state is normed already
        state = decoder.norm(rest(last, last.input_layernorm(added) + 0.2 * streams[-2])) + 0.5 * streams[-1]
    return output.logits[0, -1].double(), vlm.model.get_output_embeddings()(state).double()


@pytest.mark.parametrize(
    ("family", "path"), [("llava", "layer"), ("llava", "released"), ("qwen2_5_vl", "released"), ("gemma3", "layer")]
)
def test_scores_are_those_of_the_formula(family, path):
    vlm = vlm_of(family)
    method = ONLY(path=path, layer=LAYER, agreement=0.5, contrast=1.5, plausibility=0.02)
    found = logits(vlm, batch_of(vlm), method, steps=STEPS)
    said = found.clone()
    said[..., vlm.family.image_token(vlm.model.config)] = -torch.inf
    for row in (0, 1):
        batch = batch_of(vlm, [row])
        layout = vlm.layout(batch)
        tokens = said[:, row].argmax(dim=-1)[None]
        for step in range(STEPS):
            text = layout.text[0].nonzero()[1:, 0].tolist() + list(range(batch.length, batch.length + step))
            image = layout.tokens[0].nonzero()[:, 0].tolist()
            clean, other = second(vlm, extended(batch, tokens[:, :step]), method, text, image)
            distance = float((clean.softmax(-1) - other.softmax(-1)).abs().sum()) / 2
            expected = clean + 3 * other if distance < 0.5 else 2.5 * clean - 1.5 * other
            expected[clean < clean.max() + math.log(0.02)] = -torch.inf
            close(found[step, row], expected.float(), 1e-3)


def test_each_row_adds_or_subtracts():
    clean = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    other = torch.tensor([[[2.0, 1.1, 0.0], [0.0, 1.0, 2.0]]])
    rule = Adaptive(
        branches=(),
        rows=torch.ones(2, dtype=torch.bool),
        agreement=0.1,
        complement=3.0,
        contrast=1.0,
        plausibility=0.0,
    )
    close(rule.fuse(clean, other, clean), torch.stack([clean[0] + 3 * other[0, 0], 2 * clean[1] - other[0, 1]]))


def test_a_sink_is_left_out_of_the_entropy():
    weights = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.5])
    part = torch.ones(6, dtype=torch.bool)
    out = outlying(weights, part)
    assert out.tolist() == [False] * 5 + [True]
    assert entropy(weights, part & ~out).item() == pytest.approx(math.log(5), abs=1e-4)
    assert entropy(weights, torch.zeros(6, dtype=torch.bool)).item() == 0


def test_a_head_that_does_not_look_at_the_picture_is_switched_off_and_switches_off_no_other():
    here = site([6], keys=7, prompt=7, image=[1, 2], text=[0, 3, 4, 5, 6])
    weights = torch.tensor([[[0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1], [0.3, 0.0, 0.0, 0.3, 0.2, 0.1, 0.1]]])[:, :, None]
    stays = TextHeads(trimmed=False).share(here, weights).sum(dim=-1) > 0
    assert stays.flatten().tolist() == [True, False]


def test_presets():
    assert (ONLY().path, ONLY().agreement) == ("released", 0.1)
    assert (ONLY(preset="paper").path, ONLY(preset="paper").agreement) == ("layer", 0.2)
    assert ONLY(layer=5).check(vlm_of("llava")).startswith("layer 5 is beyond")
