"""What vlmfix is measured beside: stock transformers, and the way in which methods are released.

Shape letters (``docs/notation.md``): B rows, N branches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from vlmfix.bench.measure import Arm, Said
from vlmfix.bench.shapes import QUESTION
from vlmfix.decoders import Chain, Decoder, Greedy
from vlmfix.decoding.branches import fused
from vlmfix.decoding.passes import Passes
from vlmfix.decoding.rows import rows_of
from vlmfix.generation import VLM
from vlmfix.upstream.defaults import undisturbed

STOCK = "generate"
EAGER = "eager, weights kept"
APART = "pass by pass"


def arms_beside(decoders: Mapping[str, Decoder]) -> list[Arm]:
    """Plain decoding by transformers, and what the decoders cost in the released way.

    Attention methods are released on top of eager attention that returns all weights; one arm, without any method's own
    arithmetic, stands for them. Contrasts have an arm each.

    Args:
        decoders: The decoders that are measured, by what tables call them.
    """
    plain = Greedy().spec()
    found = [Arm(STOCK, plain, "transformers", True, stock), Arm(EAGER, plain, "transformers", False, with_weights)]
    for name, decoder in decoders.items():
        if decoder.passes > 1 and decoder.strategy is None and not isinstance(decoder, Chain):
            found.append(
                Arm(f"{name}, {APART}", decoder.spec(), "transformers", False, partial(_apart, decoder=decoder))
            )
    return found


def stock(vlm: VLM, pictures: Sequence[Image.Image], tokens: int) -> list[Said]:
    """Greedy answers by the model's own ``generate``, with the attention that it was loaded with (SDPA)."""
    return _generated(vlm, pictures, tokens)


def with_weights(vlm: VLM, pictures: Sequence[Image.Image], tokens: int) -> list[Said]:
    """Greedy answers by the model's own ``generate``, with eager attention whose weights are all returned and kept."""
    model: Any = vlm.model
    model.set_attn_implementation({"text_config": "eager"})
    try:
        return _generated(vlm, pictures, tokens, output_attentions=True)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


def _generated(vlm: VLM, pictures: Sequence[Image.Image], tokens: int, **options: Any) -> list[Said]:
    model: Any = vlm.model
    batch = vlm.encode([QUESTION] * len(pictures), [[picture] for picture in pictures])
    with undisturbed(model):
        said = model.generate(
            **batch, **options, max_new_tokens=tokens, do_sample=False, num_beams=1, return_dict_in_generate=True
        )
    return [Said(ids) for ids in said.sequences[:, batch.length :].tolist()]


@torch.no_grad()
def _apart(vlm: VLM, pictures: Sequence[Image.Image], tokens: int, *, decoder: Decoder) -> list[Said]:
    """Answers of a contrast whose branches each have a cache and a pass of their own, one after the other."""
    batch = vlm.encode([QUESTION] * len(pictures), [[picture] for picture in pictures])
    _, plan = decoder.planned(vlm, batch)
    branches = [branch.batch for contrast in plan.contrasts for branch in contrast.branches]
    passes = [Passes(vlm, rows_of(vlm, part, ()), tokens, plans={}) for part in (batch, *branches)]
    scores = fused(plan.contrasts, torch.stack([part.prompt() for part in passes]))  # (B, V)
    said: list[list[int]] = []
    while True:
        chosen = scores.argmax(dim=-1)  # (B,)
        said.append(chosen.tolist())
        if len(said) == tokens:
            return [Said(ids) for ids in zip(*said, strict=True)]
        scores = fused(plan.contrasts, torch.stack([part.token(chosen) for part in passes]))
