"""MemVR against the slow way of its formula, one row at a time, with the whole sequence anew for every token."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import batch_of, close, extended, logits, plain, vlm_of
from vlmfix.decoders import MemVR, parse
from vlmfix.errors import IncompatibleDecodersError

STEPS = 4


def unsure(vlm, state):
    """Entropy of the ten best tokens behind the last norm and the head, over ln 10."""
    decoder, head = vlm.family.decoder(vlm.model), vlm.model.get_output_embeddings()
    best = head(decoder.norm(state)).double().sort(descending=True).values[:10]
    shares = best.softmax(-1)
    return float(-(shares * shares.log()).sum()) / math.log(10)


@torch.no_grad()
def slow(vlm, batch, tokens, method, acted):
    """The logits behind one row's prompt and tokens; hooks decide for the prompt, and then for each token, in turn."""
    prompt, image = batch.length, vlm.layout(batch).tokens[0]
    layers, places = vlm.family.layers(vlm.model), method.places(vlm)
    groups = [slice(0, prompt), *(slice(prompt + step, prompt + step + 1) for step in range(tokens.shape[1]))]
    done = [False] * len(groups)
    now = {"unsure": [False] * len(groups)}

    def entering(number):
        def hook(layer, args, kwargs):
            stream = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                now["shown"] = stream[0, :prompt][image].double()
            now["unsure"] = [
                number - 1 in places and unsure(vlm, stream[0, g.stop - 1]) > method.threshold for g in groups
            ]

        return hook

    def leaving(number):
        def hook(mlp, args, output):
            new = output.clone()
            for place, group in enumerate(groups):
                if done[place] or not now["unsure"][place]:
                    continue
                done[place] = True
                acted.add((number, place > 0))
                x, f = args[0][0, group].double(), output[0, group].double()
                said = x @ now["shown"].T @ now["shown"]
                mixed = (1 - method.ratio) * f + method.ratio * f.abs().mean() / said.abs().mean() * said
                new[0, group] = mixed.float()
            return new

        return hook

    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(entering(number), with_kwargs=True))
        hooks.append(layer.mlp.register_forward_hook(leaving(number)))
    try:
        return vlm.model(**extended(batch, tokens), use_cache=False).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_scores_are_those_of_the_formula(family):
    vlm = vlm_of(family)
    method = MemVR(ratio=0.6, threshold=0.8, layers="0:2")
    found = logits(vlm, batch_of(vlm), method, steps=STEPS)
    said = found.clone()
    said[..., vlm.family.image_token(vlm.model.config)] = -torch.inf
    acted = set()
    for row in (0, 1):
        batch = batch_of(vlm, [row])
        tokens = said[:, row].argmax(dim=-1)[None]
        for step in range(STEPS):
            close(found[step, row], slow(vlm, batch, tokens[:, :step], method, acted), 1e-3)
    assert {later for _, later in acted} == {True, False}


def test_a_sure_model_is_left_alone_and_an_unsure_one_once():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    base = plain(vlm, batch)
    close(logits(vlm, batch, MemVR(threshold=1.0, ratio=0.9)), base)
    always = logits(vlm, batch, MemVR(threshold=0.0, ratio=0.9, layers="0:2"))
    close(logits(vlm, batch, MemVR(threshold=0.0, ratio=0.9, layers="0")), always)
    assert (always - base).abs().max() > 1e-2


def test_rows_without_a_picture_are_left_alone():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?", "hello"], [[], []])
    close(logits(vlm, batch, MemVR(threshold=0.0)), plain(vlm, batch))


def test_a_gate_for_which_the_prompts_last_token_passes_alone_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    for spec in ("memvr+sgrs", "sgrs+memvr"):
        with pytest.raises(IncompatibleDecodersError, match="edits a prompt's tokens together"):
            parse(spec).plan(vlm, batch, vlm.layout(batch))


def test_layers_scale_with_the_depth():
    class Deep:
        layers = 32

    assert MemVR().places(Deep()) == list(range(6, 16))
    assert MemVR().places(vlm_of("llava")) == [1]
    assert MemVR(layers="2").check(vlm_of("llava")).startswith("the model's 3 layers")
    assert (MemVR().ratio, MemVR(preset="captions").ratio) == (0.12, 0.31)
