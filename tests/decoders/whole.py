"""The slow way: whole sequences without a cache, attention as a matrix in float64, edited as a formula says."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.contracts.support import extended, logits, picture, vlm_of
from vlmfix.upstream.attention import register, switched, unregister

QUESTION = "what is this?"
STEPS = 3


@dataclass(frozen=True)
class Here:
    """One layer's attention: scaled scores (H, T, T), values (H, T, D), and what its columns and rows are.

    The scores are of ``queries`` (H, T, D), which are scaled already, and ``keys`` (H, T, D).
    """

    layer: int
    scores: Tensor
    values: Tensor
    queries: Tensor
    keys: Tensor
    image: Tensor
    """(T,) bool, image tokens."""
    before: Tensor
    """(T,) bool, prompt text before the first of them."""
    last: Tensor
    """(T,) bool, rows that predict: the prompt's last and those of the answer."""
    text: Tensor
    """(T,) bool, rows of the prompt's text behind the picture, and those of the answer."""

    def output(self, scores: Tensor) -> Tensor:
        """What attention gives with other scores, (H, T, D)."""
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~causal, -torch.inf).softmax(dim=-1) @ self.values


def both_ways(spec, edit, family="llava", steps=STEPS):
    """Scores of a prompt's last row and the tokens behind it: (steps, V) by the package, and by ``edit``.

    ``edit`` takes a ``Here`` and returns (H, T, D).
    """
    vlm = vlm_of(family)
    batch = vlm.encode([QUESTION], [[picture(5, (40, 60))]])
    found = logits(vlm, batch, spec, steps=steps)[:, 0]
    said = found[:-1].clone()
    said[:, vlm.family.image_token(vlm.model.config)] = -torch.inf  # which ``logits`` forbids
    tokens = said.argmax(dim=-1)[None]
    return found, whole(vlm, batch, tokens, edit)


@torch.no_grad()
def whole(vlm, batch, tokens, edit):
    """(steps, V) scores of the rows that predict ``tokens`` (1, steps - 1) and one more."""
    layout, length = vlm.layout(batch), batch.length
    count = length + tokens.shape[1]
    image, text = layout.image_keys(count)[0], layout.text_keys(count)[0]
    seen = image.cumsum(dim=0) > 0
    answer = torch.arange(count) >= length
    modules = list(vlm.family.attention_modules(vlm.model))

    def attention(module, query, key, value, mask, scaling=None, **_):
        repeat = query.shape[1] // key.shape[1]
        q, k, v = (x[0].double() for x in (query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)))
        q = q * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = q @ k.mT
        last = torch.arange(count) >= length - 1
        here = Here(modules.index(module), scores, v, q, k, image, text & ~seen, last, (text & seen) | answer)
        return edit(here)[None].transpose(1, 2).to(query.dtype), None

    unregister("whole")
    register("whole", attention)
    try:
        with switched([vlm.family.decoder(vlm.model), *modules], "whole"):
            output = vlm.model(**extended(batch, tokens), use_cache=False).logits[0, length - 1 :]
    finally:
        unregister("whole")
    return output


@torch.no_grad()
def in_float64(vlm, batch, tokens, change):
    """(steps, V) scores behind a prompt of one row and each of ``tokens`` (steps,) but the last, without a cache.

    They are of a copy of the model in float64, which ``change`` gets to put other weights or hooks into.
    """
    exact = type(vlm)(model=copy.deepcopy(vlm.model).double(), processor=vlm.processor, family=vlm.family)
    change(exact)
    given = extended(batch, tokens[None, :-1])
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    return exact.model(**given, use_cache=False).logits[0, batch.length - 1 :]
