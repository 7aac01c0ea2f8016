"""A tiny LLaVA without positions, MLPs or chance, whose heads look where a test tells them to."""

from __future__ import annotations

import torch
from torch import nn

from tests.tiny.llava import build
from vlmfix.generation import VLM

LAYERS, HEADS, GROUP, WIDTH = 3, 8, 4, 8
CONSTANT, IMAGE, FIRST, CODE = 40, 41, 42, 50
"""Dimensions of the residual stream that no layer writes to: 1 everywhere, 1 at image patches, 1 at the first token,
and the first of ten that are free for codes."""
SHARP = 60.0
"""Weight of a planted query and key: scores part by far more than the softmax can blur."""
PATCHES = 25


class Coded(nn.Module):
    """Stands for the projector: every patch has the code that the test gave it, and some of what CLIP saw."""

    def __init__(self, codes, inner):
        super().__init__()
        self.codes, self.inner = codes, inner

    def forward(self, features):
        seen = self.inner(features).clone()
        seen = 5 * torch.nn.functional.normalize(seen, dim=-1)  # no patch draws attention by its size
        seen[..., CONSTANT:] = self.codes[:, CONSTANT:]
        return seen


def planted_vlm(*, codes=(), tokens=(), first=1.0):
    """A model in which every head looks at all tokens alike until ``look`` says otherwise.

    Args:
        codes: (patch, dimension, value) to set in image patches.
        tokens: (character, dimension, value) to set in the embeddings of text.
        first: Size of the mark on the prompt's first token, the U of USER.
    """
    tiny = build("llava", 0)
    vlm = VLM(model=tiny.model, processor=tiny.processor, family=tiny.family, name="planted")
    patches = torch.zeros(PATCHES, 64)
    patches[:, CONSTANT] = patches[:, IMAGE] = 1.0
    for patch, dim, value in codes:
        patches[patch, dim] = value
    vocabulary = vlm.processor.tokenizer
    with torch.no_grad():
        vlm.model.model.multi_modal_projector = Coded(patches, vlm.model.model.multi_modal_projector)
        embedding = vlm.model.get_input_embeddings().weight
        embedding[:, CONSTANT:] = 0.0
        embedding[:, CONSTANT] = 1.0
        embedding[vocabulary.convert_tokens_to_ids("U"), FIRST] = first
        for character, dim, value in tokens:
            embedding[vocabulary.convert_tokens_to_ids(character), dim] = value
        vlm.family.decoder(vlm.model).rotary_emb.inv_freq.zero_()
        for layer in vlm.family.layers(vlm.model):
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
            layer.self_attn.o_proj.weight[CONSTANT:] = 0.0
            layer.mlp.down_proj.weight.zero_()
    return vlm


def look(vlm, layer, head, dim, *, sign=1.0, when=CONSTANT, place=0, sharp=SHARP):
    """Makes a head look at the keys marked in a dimension, or with ``sign=-1`` away from them.

    Args:
        vlm: The planted model.
        layer: Layer.
        head: Query head.
        dim: Dimension of the residual stream that marks the keys.
        sign: 1 or -1.
        when: Dimension that marks the queries at which it does so.
        place: Dimension of the head that carries it; heads of one group share their keys.
        sharp: Weight of the query and of the key.
    """
    module = vlm.family.attention_modules(vlm.model)[layer]
    with torch.no_grad():
        module.q_proj.weight[head * WIDTH + place, when] = sign * sharp
        module.k_proj.weight[head // GROUP * WIDTH + place, dim] = sharp


def look_away(vlm, dim=IMAGE, *, but=()):
    """Makes every head look away from the keys marked in a dimension, except some (layer, head)."""
    for layer in range(LAYERS):
        for head in range(HEADS):
            if (layer, head) not in but:
                look(vlm, layer, head, dim, sign=-1.0)
